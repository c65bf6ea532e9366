"""Which step the weights of a Trainer are of, and how many tokens they have seen; unknown is ``None``, never 0.

Beside each callback's own state a checkpoint holds one entry for all of ours, so that a callback that is added, or
whose arguments are changed, when a run is resumed still knows the tokens. Checkpoints of earlier versions have no such
entry; there the state under any earlier key of our classes is read.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lightning_spectral.probe.guard import warn
from lightning_spectral.probe.observer import Observer
from lightning_spectral.probe.run_folder import RunFolder

ENTRY = "lightning_spectral"
_OURS = ("SpectralRankCallback", "TailTokenProbe")


class Progress:
    """Of one callback.

    Attributes:
        has_state: Whether the callback's own state came with the checkpoint that was loaded.
        run_id: The run that the loaded checkpoint is of, if known.
        folder: Where that run's records were written, if known.
    """

    def __init__(self) -> None:
        self.has_state = False
        self.run_id: str | None = None
        self.folder: str | None = None
        self._loaded_step: int | None = None
        self._loaded_tokens: int | None = None
        self._trained_to: int | None = None
        self._finished = False

    def save(self, observer: Observer, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        """Write the entry into a checkpoint."""
        folder = observer.run_folder
        checkpoint[ENTRY] = {
            "step": trainer.global_step,
            "tokens_seen": observer.tokens.seen,
            "run_id": folder.run_id if folder else None,
            "folder": str(folder.path) if folder else None,
        }

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Read it from the checkpoint that a Trainer restores."""
        entry = checkpoint.get(ENTRY) or _earlier(checkpoint.get("callbacks") or {})
        self._loaded_step = checkpoint.get("global_step")
        self._loaded_tokens, self.run_id = entry.get("tokens_seen"), entry.get("run_id")
        self.folder = entry.get("folder")
        self.has_state = False

    def reconcile(self, observer: Observer, step: int) -> None:
        """When training starts: tokens and schedule are those of this step, or unknown."""
        self._finished = False
        known = step == 0 or self._trained_to == step or (self.has_state and self._loaded_step == step)
        if not known:
            observer.tokens.seen = self._loaded_tokens if self._loaded_step == step else None
            observer.schedule.previous = None
        self._trained_to = step

    def warn_of_gap(self, folder: RunFolder) -> None:
        """Say where the earlier records are, if a resumed run does not go on in their folder."""
        if folder.writes and self.run_id not in (None, folder.run_id):
            before = f"`{self.folder}`" if self.folder else f"the folder of the run `{self.run_id}`"
            warn(
                f"the resumed run records in `{folder.path}`, its records up to step {self._loaded_step} are in "
                f"{before}: a logger that counts versions has begun a new one. `dirpath=`, or a `version` of the "
                "logger, keeps a run in one folder."
            )

    def of_weights(self, observer: Observer, trainer: pl.Trainer) -> tuple[int | None, int | None]:
        """Step and tokens of the weights that an evaluation has seen."""
        if trainer.state.fn == "fit":
            return trainer.global_step, observer.tokens.seen
        if trainer.ckpt_path is not None:
            return self._loaded_step, self._loaded_tokens
        if trainer.global_step > 0:
            return trainer.global_step, observer.tokens.seen if self._trained_to == trainer.global_step else None
        return None, None

    def finish(self, step: int) -> None:
        """Training has ended by itself."""
        self._trained_to, self._finished = step, True

    def facts(self) -> dict[str, Any]:
        """For ``run.json``."""
        return {"finished": True, "last_step": self._trained_to} if self._finished else {}


def _earlier(states: dict[str, Any]) -> dict[str, Any]:
    """State of one of our callbacks in a checkpoint without the entry."""
    for key, state in states.items():
        if any(name in str(key) for name in _OURS) and isinstance(state, dict) and "tokens_seen" in state:
            return state
    return {}
