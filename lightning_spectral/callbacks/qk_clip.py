"""``QKClipCallback``: MuonClip's cap on attention logits, for any optimizer."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from lightning_spectral.callbacks.trainer_host import log_scalars
from lightning_spectral.models.placement import Shards, blocks_of, local
from lightning_spectral.models.query_key import Attention, HeadRows, LargestLogits, find_attentions
from lightning_spectral.probe.guard import warn
from lightning_spectral.text.arguments import refuses_unknown, require_count, require_kinds

# H query heads, G key heads


class QKClipCallback(Callback):
    """Keep attention logits below a threshold by scaling query and key weights after the step (QK-Clip).

    Of a head whose largest logit ``S`` was above ``threshold``, the query and the key weights (and biases) are each
    multiplied by ``sqrt(threshold / S)`` (Kimi K2, arXiv:2507.20534), so that its logits shrink by ``threshold / S``.
    Where query heads share a key head (GQA), the key takes the smallest of these roots, each query what is missing to
    its own factor. What is not above the threshold stays as it is, to the last bit. Works on litgpt and Hugging Face
    attention (fused or not) under DDP, FSDP and FSDP2; needs a forward pass that runs eagerly.

    Logs ``qk_clip/max_logit`` and ``qk_clip/clipped_heads``.

    Args:
        threshold: Largest logit allowed, > 0.
        every_n_steps: Look at the logits of every n-th step; looking costs about a third of the attention.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: Before step 1, if there are no query and key heads to find, or they are normalised.

    Example:
        ``Trainer(callbacks=[QKClipCallback(threshold=100.0)])``
    """

    @refuses_unknown
    def __init__(self, threshold: float = 100.0, *, every_n_steps: int = 1) -> None:
        require_kinds(QKClipCallback.__init__, locals())
        if not threshold > 0:
            raise ValueError(f"`threshold` must be > 0, got {threshold!r}.")
        require_count("every_n_steps", every_n_steps)
        self.threshold, self.every_n_steps = threshold, every_n_steps
        self._attentions: list[Attention] = []
        self._modes: list[LargestLogits] = []
        self._handles: list[Any] = []
        self._step: int | None = None  # the step that is looked at
        self._is_blind = False

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._attentions = list(find_attentions(pl_module))
        if not self._attentions:
            raise MisconfigurationException(
                f"QKClipCallback found no query and key heads in `{type(pl_module).__name__}`. It knows "
                "projections named like q_proj and k_proj, or qkv, and a number of heads in the module or its config."
            )
        normalised = [one.name for one in self._attentions if one.normalises]
        if normalised:
            raise MisconfigurationException(
                f"QKClipCallback: `{normalised[0]}` normalises queries and keys, so that scaling their weights "
                "changes no logit. Remove the callback: the norms bound the logits already."
            )
        self._modes = [LargestLogits(hasattr(one.module, "sinks")) for one in self._attentions]
        for mode, attention in zip(self._modes, self._attentions, strict=True):
            self._watch(attention, mode)

    def _watch(self, attention: Attention, mode: LargestLogits) -> None:
        entered: list[LargestLogits] = []

        def before(*_: Any) -> None:
            if self._step is not None:
                entered.append(mode.__enter__())  # type: ignore[no-untyped-call]

        def after(*_: Any) -> None:
            if entered:
                entered.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

        self._handles += [
            attention.module.register_forward_pre_hook(before),
            attention.module.register_forward_hook(after, always_call=True),
        ]

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self._step is None and step % self.every_n_steps == 0 and not self._is_blind:
            self._step = step
            for mode in self._modes:
                mode.largest = None

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._step is None or trainer.global_step == self._step:
            return  # gradients still accumulate
        self._step = None
        largest = self._largest(pl_module.device)
        if largest is None:
            return
        # a largest logit below zero is no reason to scale by a negative number
        factors = [torch.where(one > self.threshold, self.threshold / one, 1.0) for one in largest]
        if bool(torch.cat(factors).lt(1.0).any()):
            shards = Shards()
            for attention, factor_H in zip(self._attentions, factors, strict=True):
                if bool(factor_H.lt(1.0).any()):
                    _scale(attention, factor_H, shards)
        clipped = sum(int(factor.lt(1.0).sum()) for factor in factors)
        found = {"qk_clip/max_logit": float(torch.cat(largest).max()), "qk_clip/clipped_heads": float(clipped)}
        log_scalars(trainer, found, trainer.global_step)

    def _largest(self, device: torch.device) -> list[Tensor] | None:
        """Largest logits of every attention over all ranks, on the host; None where a head was not seen."""
        together = torch.full((sum(self._sizes),), -torch.inf, device=device)
        for mode, part in zip(self._modes, together.split(self._sizes), strict=True):
            if mode.largest is not None and len(mode.largest) == len(part):
                part.copy_(mode.largest)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(together, op=dist.ReduceOp.MAX)
        largest = list(together.cpu().split(self._sizes))
        pairs = zip(self._attentions, largest, strict=True)
        unseen = [attention.name for attention, found in pairs if not bool(torch.isfinite(found).all())]
        if unseen:
            self._is_blind = True
            warn(
                f"QKClipCallback saw no finite logits in {len(unseen)} attentions, {unseen[0]} first: a compiled "
                "forward pass, an attention kernel of its own, divided heads, or NaN. Nothing more is clipped."
            )
            return None
        return largest

    @property
    def _sizes(self) -> list[int]:
        return [attention.num_queries for attention in self._attentions]

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stop()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._modes, self._attentions, self._step, self._is_blind = [], [], [], None, False

    def __getstate__(self) -> dict[str, Any]:
        """What a copy needs: hooks stay with the original."""
        return {"threshold": self.threshold, "every_n_steps": self.every_n_steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A callback that does the same, attached to nothing."""
        self.__init__(state["threshold"], every_n_steps=state["every_n_steps"])  # type: ignore[misc]


@torch.no_grad()
def _scale(attention: Attention, factor_H: Tensor, shards: Shards) -> None:
    """Multiply the rows of every head by its factors, wherever they are held."""
    of_key_G = factor_H.view(attention.num_keys, -1).amin(dim=1).sqrt()
    of_query_H = factor_H / of_key_G.repeat_interleave(attention.num_queries // attention.num_keys)
    for rows in attention.rows:
        kinds = ((rows.queries, of_query_H), (rows.keys, of_key_G), (rows.alone, factor_H))
        _scale_rows(rows, [factor for parts, each in kinds if parts for factor in each.tolist()], shards)


def _scale_rows(rows: HeadRows, factors: list[float], shards: Shards) -> None:
    param = rows.param
    shard = shards.of(param, rows.name)  # type: ignore[arg-type]
    held = local(param)
    flat = held.view(-1)
    for view, factor in zip(rows.views(shard.shape), factors, strict=True):
        if factor != 1.0:
            for block in blocks_of(view, shard):
                block.of(flat).mul_(factor)
