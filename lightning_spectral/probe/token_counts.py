"""Tokens of a training: how many have been seen, and how often each id occurs, without touching the data.

Axes: V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_spectral.functional.buckets import frequency_buckets, look_up
from lightning_spectral.models.calls import ForwardCall
from lightning_spectral.models.stacks import num_ids
from lightning_spectral.probe.adapters import ids_in, is_of
from lightning_spectral.probe.collectives import all_reduce
from lightning_spectral.probe.grouping import Grouping
from lightning_spectral.probe.measurement import Measurement
from lightning_spectral.probe.probe import SpectralProbe
from lightning_spectral.probe.ranks_of import RankMeasurement
from lightning_spectral.probe.results import WindowResult
from lightning_spectral.probe.settings import BucketSettings
from lightning_spectral.records import BUCKETS, POOLED

_AHEAD = range(9)  # tokens that a model may be asked to predict beyond those that it is given
ENOUGH_PER_ID = 10  # tokens per id of the vocabulary after which HEAD, MID and TAIL are settled
REASON = "token counts: too few tokens were seen so far (`counts='stream'`)"


NOT_ALL = (
    "the model was given {given:,} token ids of a batch that holds {held:,}: how many tokens the training has seen is "
    "unknown from here on (`tokens_seen` is null), and curves are over steps"
)
NO_IDS = "token counts: no token ids were found in the training batches (`counts='stream'`); pass `counts`"


class TokenCounter:
    """Training tokens over all ranks; ``None`` once a batch held no ids that are recognised, or more than were used.

    Attributes:
        seen: The number.
        before_step: The optimizer step whose first micro-batch came last, and the number before it.
    """

    def __init__(self) -> None:
        self.seen: int | None = 0
        self.before_step: tuple[int, int | None] | None = None
        self._extra_columns = 0
        self._used: list[bool] | None = None  # which tensors of ids of a batch the model is given, where that is known
        self._num_given: int | None = None  # in this micro-batch
        self._from_loop: int | None = None  # ids of the step under way that the loop has given, not counted yet

    def learn(self, batch: Any, calls: Sequence[ForwardCall], *, to_the_end: bool) -> None:
        """From a micro-batch that was watched: a batch may hold ids, or last columns, that the model is not given.

        Args:
            batch: What the script was given.
            calls: The forward calls over it.
            to_the_end: Whether they are all: a script that steps by hand may go on after its first step.
        """
        ids = [call.ids for call in calls if call.ids is not None]
        tensors = ids_in(batch)
        if not ids or not tensors:
            return
        used = [any(is_of(tensor, one) for one in ids) for tensor in tensors]
        self._used = used if any(used) else None
        if any(used):
            tensors = [tensor for tensor, is_used in zip(tensors, used, strict=True) if is_used]
        beyond = {tensor.shape[-1] - one.shape[-1] for tensor in tensors for one in ids}
        self._extra_columns = next(iter(beyond)) if len(beyond) == 1 and beyond <= {*_AHEAD} else 0
        if to_the_end and not any(used) and len(ids) == len(calls):
            self._num_given = given = sum(one.numel() for one in ids)  # whole, or in pieces
            fitting = (extra for extra in _AHEAD if given == sum(_tokens_of(tensor, extra) for tensor in tensors))
            self._extra_columns = next(fitting, self._extra_columns)

    def begin_step(self, step: int) -> None:
        """Before a micro-batch of this optimizer step."""
        if self.before_step is None or self.before_step[0] != step:
            self.before_step = step, self.seen
            self._from_loop = None

    def before(self, step: int) -> int | None:
        """Tokens seen by the weights of a step, without micro-batches of the one under way that is forgotten."""
        return self.before_step[1] if self.before_step is not None and self.before_step[0] == step else self.seen

    def give(self, ids: Tensor) -> None:
        """Ids of this step that the loop has given, to be counted where the model is called with none."""
        self._from_loop = (self._from_loop or 0) + ids.numel()

    def add(self, batch: Any, num_replicas: int) -> str:
        """Count one rank's batch for all ranks with other data.

        Returns:
            Why the number is unknown from here on; empty where it is not, or was before.
        """
        given, self._num_given = self._num_given, None
        if self.seen is None:
            return ""
        tensors = ids_in(batch)
        if not tensors and self._from_loop is not None:
            self.seen += self._from_loop * num_replicas
            self._from_loop = 0
            return ""
        if self._used is not None and len(self._used) == len(tensors):
            tensors = [tensor for tensor, is_used in zip(tensors, self._used, strict=True) if is_used]
        held = sum(_tokens_of(tensor, self._extra_columns) for tensor in tensors)
        if not tensors or (given is not None and given < held and not _is_split(num_replicas)):
            self.seen = None
            return NOT_ALL.format(given=given, held=held) if tensors else ""
        self.seen += held * num_replicas
        return ""

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"tokens_seen": self.seen, "extra_columns": self._extra_columns, "used": self._used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self.seen, self._extra_columns = state["tokens_seen"], state.get("extra_columns", 0)
        self._used = state.get("used")


class StreamCounts:
    """HEAD, MID and TAIL by the tokens of the training batches themselves, settled once enough of them were seen.

    Until then all rows of a window are accumulated together: its pooled numbers are right, those of the buckets have
    the status ``not_matched``. Once settled, the table never changes, and its digest stands in the records'
    conventions.

    Attributes:
        table_V: Bucket of each id, once settled.
        counts_V: Occurrences over all ranks, as of the last window.
    """

    def __init__(self) -> None:
        self.table_V: Tensor | None = None
        self.counts_V: Tensor | None = None
        self._local_V: Tensor | None = None
        self._buckets = BucketSettings()
        self._num_batches = 0

    def make_probe(self, model: nn.Module, measurement: Measurement) -> SpectralProbe:
        """A probe whose buckets follow the counts.

        Raises:
            ValueError: If the model does not say how many ids it has.
        """
        assert measurement.buckets is not None
        self._buckets = measurement.buckets
        probe = SpectralProbe(model, Grouping(BUCKETS, self._codes, self._buckets.attribute_to), measurement.options)
        vocab = num_ids(probe.found.embedding)
        if vocab is None:
            probe.remove()
            raise ValueError(_no_vocabulary(model, probe.found.embedding))
        if self.counts_V is None:
            self.counts_V = torch.zeros(vocab, dtype=torch.int64)
        return probe

    def add(self, batch: Any) -> None:
        """Count the ids of a training batch; nothing once settled."""
        if self.table_V is not None or self.counts_V is None or self._is_full:
            return
        self._num_batches += 1
        for ids in ids_in(batch):
            self.add_ids(ids)

    def add_ids(self, ids: Tensor) -> None:
        """Count ids; what is no id of the vocabulary is left out."""
        assert self.counts_V is not None
        vocab, flat = len(self.counts_V), ids.detach().reshape(-1)
        if self._local_V is None:
            self._local_V = torch.zeros(vocab + 1, dtype=torch.int64, device=flat.device)
        known = torch.where((flat >= 0) & (flat < vocab), flat, vocab).to(self._local_V.device, torch.int64)
        self._local_V.scatter_add_(0, known, torch.ones_like(known))  # unlike bincount it does not wait for a GPU

    def reduce(self, process_group: dist.ProcessGroup | None, device: torch.device, *, whole: bool = False) -> None:
        """Add the counts of all ranks, and settle the table if they are enough. Every rank must call it.

        Args:
            process_group: Ranks with different data.
            device: Where the ranks' collectives work.
            whole: The counts are all that can be had.
        """
        if self.table_V is not None:
            return
        assert self.counts_V is not None
        vocab = len(self.counts_V)
        local = torch.zeros(vocab, dtype=torch.int64) if self._local_V is None else self._local_V[:vocab]
        full = torch.tensor([int(self._is_full)])
        joint = torch.cat([local.to(device), full.to(device)])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(process_group) > 1:
            all_reduce(joint, process_group)
        self.counts_V, self._local_V = self.counts_V + joint[:-1].cpu(), None
        total = int(self.counts_V.sum())
        if total and (whole or int(joint[-1]) or total >= ENOUGH_PER_ID * vocab):
            self.table_V = frequency_buckets(self.counts_V, self._buckets.head_share, self._buckets.mid_share)

    def label(
        self, result: WindowResult, conventions: dict[str, str], *, settled: bool
    ) -> tuple[WindowResult, dict[str, str]]:
        """A window's result and conventions, with what is known of its buckets.

        Args:
            result: As measured.
            conventions: Of the measurement.
            settled: Whether the table was settled when the window began.
        """
        if settled and self.counts_V is not None:
            digest = hashlib.sha256(self.counts_V.numpy().tobytes()).hexdigest()[:12]
            return result, {**conventions, "counts": f"stream, {int(self.counts_V.sum())} tokens, {digest}"}
        seen = self.counts_V is not None and bool(self.counts_V.any())
        reason = REASON if seen else NO_IDS
        sites = [
            site
            if site.bucket == POOLED or site.measurement.status in ("no_forward", "solve_failed")
            else replace(site, measurement=RankMeasurement(0, site.measurement.width, "not_matched"), reason=reason)
            for site in result.sites
        ]
        losses = [
            loss
            if loss.bucket == POOLED
            else replace(loss, num_tokens=0, loss=None, accuracy=None, status="not_matched")
            for loss in result.losses
        ]
        return replace(result, sites=sites, losses=losses), {**conventions, "counts": "stream, not settled"}

    @property
    def counted(self) -> tuple[Tensor, Tensor] | None:
        """Bucket and occurrences of each id, once settled."""
        return None if self.table_V is None or self.counts_V is None else (self.table_V, self.counts_V)

    def state_dict(self) -> dict[str, Any]:
        """Counts of all ranks as of the last window; what one rank has counted since is not kept."""
        return {"counts_V": self.counts_V, "settled": self.table_V is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with these counts."""
        self.counts_V, self._local_V = state["counts_V"], None
        if state["settled"] and self.counts_V is not None:
            self.table_V = frequency_buckets(self.counts_V, self._buckets.head_share, self._buckets.mid_share)

    @property
    def _is_full(self) -> bool:
        limit = self._buckets.count_batches
        return limit is not None and self._num_batches >= limit

    def _codes(self, ids: Tensor) -> Tensor:
        return torch.zeros_like(ids) if self.table_V is None else look_up(ids, self.table_V)


def _tokens_of(tensor: Tensor, extra_columns: int) -> int:
    """Ids of a batch that a model is given; packed ones, (N,), have no columns."""
    columns = tensor.shape[-1] - (extra_columns if tensor.ndim > 1 else 0)
    return tensor.numel() // max(tensor.shape[-1], 1) * columns


def _is_split(num_replicas: int) -> bool:
    """Whether several ranks share a batch, so that each model is given a part of it."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > num_replicas


def _no_vocabulary(model: nn.Module, embedding: nn.Module | None) -> str:
    """Why the ids of a model cannot be counted, and what to do."""
    if embedding is not None:
        kind = type(embedding).__name__
        return f"`counts='stream'`: {kind} does not say how many ids it has (`num_embeddings`): pass `counts`."
    return (
        f"`counts='stream'`: no token embedding was found in `{type(model).__name__}`, so that no token is "
        "frequent or rare: name it (`embedding='*.wte'`), or measure all rows together (`SpectralRankCallback`)."
    )
