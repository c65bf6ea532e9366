"""Keeps what flows through a model's stacks, one micro-batch at a time.

``start`` before a micro-batch, ``collect`` after it; ``pause`` and ``resume`` around the backward pass where the loop
knows it (recomputation inside it is recognised without them in eager code). Once attached, it never raises: what it
could not make sense of is in ``notes``.
"""

from __future__ import annotations

from lightning_spectral.models.calls import ForwardCall
from lightning_spectral.models.families import TappedModel
from lightning_spectral.models.stacks import Site
from lightning_spectral.models.taps import ForwardPass, Taps


class Recorder:
    """The hooks on one model.

    Args:
        found: What to hook.
        token_fraction: Share of the rows to keep, in (0, 1]; drawn evenly along every sequence, the same for all sites.
        with_logits: Also keep the head's output.
        follow_forward: Arm from the root's forward.
    """

    def __init__(
        self,
        found: TappedModel,
        *,
        token_fraction: float = 1.0,
        with_logits: bool = False,
        follow_forward: bool = True,
    ) -> None:
        self._taps = Taps(found, token_fraction=token_fraction, with_logits=with_logits, follow_forward=follow_forward)
        self.sites: list[Site] = list(found.sites)
        self.notes: dict[str, str] = {}

    @property
    def open(self) -> bool:
        """Whether forwards are being recorded."""
        return self._taps.open

    @open.setter
    def open(self, is_open: bool) -> None:
        self._taps.open = is_open

    def start(self, *, seed: int = 0, training: bool = True) -> None:
        """Open for one micro-batch.

        Args:
            seed: Draws the kept rows; must be equal on all ranks.
            training: Count only forwards with gradients enabled, of modules in training mode. ``False`` counts every
                forward (evaluation, a pass over a checkpoint).
        """
        self._taps.start(seed=seed, training=training)

    def pause(self) -> None:
        """Before the backward pass: what runs now is recomputation."""
        self._taps.arm(False)

    def resume(self) -> None:
        """After the backward pass."""
        self._taps.arm(True)

    def collect(self) -> list[ForwardCall]:
        """Close and return every forward call since :meth:`start`, in order. Never raises; see :attr:`notes`.

        :attr:`notes` maps a short cause to one sentence for the user; both stay until :meth:`discard`. :attr:`sites`
        grows when a shared or looped layer is seen to run at a further depth.
        """
        try:
            return [_call(forward, self.sites) for forward in self._taps.collect()]
        except RuntimeError as error:
            self.notes["not_understood"] = str(error)
            self._taps.discard()
            return []

    def discard(self) -> None:
        """Close and forget what was kept."""
        self._taps.discard()

    def remove(self) -> None:
        """Take every hook off the model."""
        self._taps.remove()


def _call(forward: ForwardPass, sites: list[Site]) -> ForwardCall:
    ids_BT = forward.ids_BT
    num_sequences, length = ids_BT.shape
    sequences_P = ids_BT.new_tensor(range(num_sequences)).repeat_interleave(length)
    every_place = ids_BT.new_tensor(range(ids_BT.numel())) if forward.kept_N is None else forward.kept_N
    return ForwardCall(
        stack=sites[0].stack,
        shape=tuple(ids_BT.shape),
        ids=ids_BT,
        sequences_P=sequences_P,
        num_sequences=num_sequences,
        rows=forward.rows,
        places={key: forward.tokens.get(key, every_place) for key in forward.rows},
        layout="(B, T)",
        logits=forward.logits_BTV,
    )
