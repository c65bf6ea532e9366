"""The measurement itself, without Lightning: taps in, ranks out. Callbacks and Fabric loops drive the same object.

``begin`` a window, ``start`` and ``collect`` around each micro-batch, then ``end`` it.

Axes: B sequences, T positions, N rows, D features, K buckets.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_spectral.functional.buckets import EXCLUDED, sort_by_group, target_ids
from lightning_spectral.functional.covariance import Moments, empty_moments, update_
from lightning_spectral.functional.packed import packed_size
from lightning_spectral.functional.products import Calibration, calibrate, strips
from lightning_spectral.functional.sample import Gram, gram
from lightning_spectral.models.families import Site, resolve
from lightning_spectral.models.taps import ForwardPass, Taps
from lightning_spectral.probe.grouping import Grouping, check_vocabulary
from lightning_spectral.probe.losses import BucketLosses
from lightning_spectral.probe.options import ProbeOptions
from lightning_spectral.probe.window import BucketLoss, Buckets, ClosedWindow, WindowResult

# A product over fewer rows moves more memory than it multiplies: rows wait until there are this many.
FLUSH_ROWS = 2_048


@dataclass
class OpenWindow:
    """What a window has taken in so far."""

    states: dict[str, Moments | Gram] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    waiting: dict[str, list[Tensor]] = field(default_factory=dict)
    waiting_groups: list[Tensor] = field(default_factory=list)
    losses: BucketLosses | None = None
    sequences_K: Tensor | None = None
    num_sequences: int = 0
    num_passes: int = 0
    busy_s: float = 0.0


@dataclass(frozen=True)
class Seen:
    """What one rank saw in a window.

    Attributes:
        num_passes: Forward passes.
        widths: Features of each site that had a row, by site key.
    """

    num_passes: int
    widths: dict[str, int]


class SpectralProbe:
    """Taps on one model and the moments that they feed.

    Args:
        model: Module that holds a decoder, wrapped or not.
        grouping: Which bucket a row belongs to.
        options: What to measure.

    Raises:
        ValueError: If no site is found, or the token counts are of another tokenizer.
    """

    def __init__(self, model: nn.Module, grouping: Grouping, options: ProbeOptions) -> None:
        self.grouping, self.options = grouping, options
        self.buckets = Buckets(grouping.names, options.num_jackknife_groups)
        self.tapped = resolve(model, sites=options.sites, modules=options.modules, embedding=options.embedding)
        vocab, config = (
            getattr(self.tapped.embedding, "num_embeddings", None),
            getattr(self.tapped.root, "config", None),
        )
        if grouping.vocab_size is not None and vocab is not None:
            num_known = getattr(config, "vocab_size", None) if hasattr(config, "padded_vocab_size") else None
            check_vocabulary(grouping.vocab_size, vocab, num_known)
        _forget_compiled_code(model)
        # Blocks that a LightningModule runs one by one inside `training_step` have no forward to follow.
        self.follows_forward = not (self.tapped.root is model and hasattr(model, "training_step"))
        self.taps = Taps(
            self.tapped,
            token_fraction=options.token_fraction,
            with_logits=options.with_losses,
            follow_forward=self.follows_forward,
        )
        self.products = self._choose_products()
        self._waiting_rows = self._rows_to_wait_for()
        self.window = OpenWindow()
        self.begin()

    @property
    def state_mib(self) -> float | None:
        """Memory of the moments during a window, MiB; ``None`` if a width is not known before the first forward."""
        widths = [declared_width(site) for site in self.tapped.sites]
        if None in widths:
            return None
        return sum(4 * self.buckets.num_groups * packed_size(width) for width in widths if width) / 2**20

    @property
    def waiting_mib(self) -> float:
        """Rows that may wait for a product, as fp32, MiB: a model in bf16 keeps half of it."""
        widths = sum(declared_width(site) or 0 for site in self.tapped.sites if site.router is None)
        return 4 * self._waiting_rows * widths / 2**20

    def begin(self) -> OpenWindow:
        """Start a window with nothing in it; the one open before is returned, to be put back as ``window``."""
        self.taps.discard()
        before = self.window
        self.window = OpenWindow(losses=BucketLosses(len(self.grouping.names)) if self.options.with_losses else None)
        return before

    def start(self, seed: int) -> None:
        """Before a micro-batch of the window; ``seed`` draws the kept positions, equal on all ranks."""
        self.taps.start(seed=seed)

    def collect(self, mask_BT: Tensor | None = None, targets_BT: Tensor | None = None) -> None:
        """After a micro-batch: take its rows in.

        Args:
            mask_BT: False where a position is padding.
            targets_BT: The token to predict at each position; default the next one.

        Raises:
            ValueError: If the mask does not have the shape of the ids.
            RuntimeError: If a site did not run as often as the embedding.
        """
        began = time.perf_counter()
        with torch.inference_mode(False), torch.no_grad():
            for forward in self.taps.collect():
                self._take(forward, mask_BT, targets_BT)
            if sum(len(groups) for groups in self.window.waiting_groups) >= self._waiting_rows:
                self._flush()
        self.window.busy_s += time.perf_counter() - began

    def end(self, process_group: dist.ProcessGroup | None = None) -> WindowResult:
        """Close the window and solve it. Every rank of the group must call it; the result is equal on all."""
        self.settle(alone=self._world_size(process_group) == 1)
        closed = self.close(process_group)
        return closed.share(closed.solve())

    def settle(self, *, alone: bool) -> Seen:
        """Before a window is closed: multiply the rows that still wait, and say what this rank saw. No collective.

        Args:
            alone: No other rank's rows are added.
        """
        began = time.perf_counter()
        with torch.inference_mode(False), torch.no_grad():
            self._flush(to_be_added=not alone)
        self.window.busy_s += time.perf_counter() - began
        return Seen(self.window.num_passes, {key: state.width for key, state in self.window.states.items()})

    def close(
        self, process_group: dist.ProcessGroup | None = None, widths: Mapping[str, int] | None = None
    ) -> ClosedWindow:
        """Add the states of all ranks; what is left is to solve the window and to share the results.

        Every rank of the group must call it, after :meth:`settle`.

        Args:
            process_group: Default: the world.
            widths: Features of the sites that any rank saw a row of, where modules do not declare them.

        Raises:
            RuntimeError: If a site saw no row on this rank and nothing says how wide it is.
        """
        began = time.perf_counter()
        with torch.inference_mode(False), torch.no_grad():
            world_size = self._world_size(process_group)
            num_sequences, num_passes = self._sequence_counts(process_group, world_size)
            if num_passes == 0:
                return self.lose("no_forward", "the model did not run in this window, or a compiled one skipped hooks")
            if world_size > 1:
                self._complete_states(widths or {})
            losses = self._bucket_losses(process_group, world_size)
            window = self.begin()
            closed = self._closed(window, losses, num_sequences, process_group, world_size)
            closed.reduce()
        closed.busy_s = window.busy_s + time.perf_counter() - began
        return closed

    def lose(self, status: str, reason: str) -> ClosedWindow:
        """Give the window up: every site and bucket gets a result without a number. No collective."""
        window = self.begin()
        closed = self._closed(window, [], {}, None, 1)
        closed.lost, closed.busy_s = (status, reason), window.busy_s
        return closed

    def _closed(
        self,
        window: OpenWindow,
        losses: list[BucketLoss],
        num_sequences: Mapping[str, int],
        process_group: dist.ProcessGroup | None,
        world_size: int,
    ) -> ClosedWindow:
        return ClosedWindow(
            sites=self.tapped.sites,
            states=window.states,
            buckets=self.buckets,
            num_sequences=num_sequences,
            dtypes=window.dtypes,
            losses=losses,
            options=self.options,
            process_group=process_group,
            world_size=world_size,
        )

    def _world_size(self, process_group: dist.ProcessGroup | None) -> int:
        distributed = self.options.reduce and dist.is_available() and dist.is_initialized()
        return dist.get_world_size(process_group) if distributed else 1

    def remove(self) -> None:
        """Take the hooks off and free the state."""
        self.begin()
        self.taps.remove()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(iter(self.tapped.embedding.parameters())).device

    def _take(self, forward: ForwardPass, mask_BT: Tensor | None, targets_BT: Tensor | None) -> None:
        ids_BT = forward.ids_BT
        self.window.num_passes += 1
        if targets_BT is None or targets_BT.shape != ids_BT.shape:
            targets_BT = target_ids(ids_BT)
        real_BT = _real_positions(ids_BT, mask_BT)
        if self.window.losses is not None and forward.logits_BTV is not None:
            loss_codes_BT = torch.where(real_BT, self.grouping.loss_codes(targets_BT), EXCLUDED)
            self.window.losses.add(forward.logits_BTV, targets_BT, loss_codes_BT, forward.kept_N)
        if forward.kept_N is not None:
            kept_BT = torch.zeros_like(real_BT)
            kept_BT.view(-1)[forward.kept_N] = True
            real_BT = real_BT & kept_BT
        codes_BT = torch.where(real_BT, self.grouping.codes(ids_BT, targets_BT), EXCLUDED)
        groups = self._groups(codes_BT).flatten()
        self.window.waiting_groups.append(groups if forward.kept_N is None else groups[forward.kept_N])
        for site in self.tapped.sites:
            rows_ND = forward.rows.get(site.key)
            if rows_ND is None:
                continue
            self.window.dtypes[site.key] = str(rows_ND.dtype).removeprefix("torch.")
            if site.router is not None:
                # Each expert has its own few tokens: their rows cannot wait with the others'.
                expert_groups = groups[forward.tokens[site.key]]
                self._add(site, rows_ND, *sort_by_group(expert_groups, self.buckets.num_groups))
            else:
                self.window.waiting.setdefault(site.key, []).append(rows_ND)

    def _groups(self, codes_BT: Tensor) -> Tensor:
        """Bucket codes -> group indices: sequences are dealt to the shards in turn."""
        present = [(codes_BT == code).any(1).sum() for code in range(len(self.grouping.names))]
        sequences_K = torch.stack([*present, (codes_BT >= 0).any(1).sum()])
        self.window.sequences_K = (
            sequences_K if self.window.sequences_K is None else self.window.sequences_K + sequences_K
        )
        sequence_B = torch.arange(len(codes_BT), device=codes_BT.device) + self.window.num_sequences
        self.window.num_sequences += len(codes_BT)
        shard_B1 = (sequence_B % self.buckets.num_jackknife_groups).unsqueeze(1)
        return torch.where(codes_BT >= 0, codes_BT * self.buckets.num_jackknife_groups + shard_B1, EXCLUDED)

    def _flush(self, to_be_added: bool = True) -> None:
        """Multiply the rows that wait. ``to_be_added``: more rows may come, from here or from other ranks."""
        if not self.window.waiting_groups:
            return
        sizes, order_M = sort_by_group(torch.cat(self.window.waiting_groups), self.buckets.num_groups)
        for site in self.tapped.sites:
            waiting = self.window.waiting.get(site.key)
            if not waiting:
                continue
            rows_ND = waiting[0] if len(waiting) == 1 else torch.cat(waiting)
            waiting.clear()
            if not to_be_added and site.key not in self.window.states and sum(sizes) < rows_ND.shape[1]:
                self.window.states[site.key] = gram(rows_ND, sizes, order_M)
            else:
                self._add(site, rows_ND, sizes, order_M)
        self.window.waiting_groups.clear()

    def _add(self, site: Site, rows_ND: Tensor, sizes: list[int], order_M: Tensor | None) -> None:
        width = rows_ND.shape[1]
        moments = self.window.states.get(site.key)
        if moments is None:
            moments = self._empty_state(width, rows_ND.dtype, rows_ND.device)
            self.window.states[site.key] = moments
        assert isinstance(moments, Moments)
        product = self.products[width].product if width in self.products else strips
        update_(moments, rows_ND, sizes, order_M, product)

    def _rows_to_wait_for(self) -> int:
        """Rows may wait while they take no more memory than the moments would: fewer than D of them need no moments."""
        widths = [declared_width(site) for site in self.tapped.sites]
        groups = self.buckets.num_groups
        return max([FLUSH_ROWS, *(min(width, groups * packed_size(width) // width) for width in widths if width)])

    def _choose_products(self) -> dict[int, Calibration]:
        """The fastest correct product for each width that is known before the first forward."""
        parameter = next(iter(self.tapped.embedding.parameters()))
        widths = sorted({width for site in self.tapped.sites if (width := declared_width(site)) is not None})
        if parameter.dtype == torch.float64:
            return {}
        return {width: calibrate(width, device=parameter.device, activations=parameter.dtype) for width in widths}

    def _empty_state(self, width: int, dtype: torch.dtype, device: torch.device) -> Moments:
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        return empty_moments(self.buckets.num_groups, width, dtype=dtype, device=device)

    def _complete_states(self, widths: Mapping[str, int]) -> None:
        """A rank that saw no row of a site still takes part in its reduction."""
        for site in self.tapped.sites:
            if site.key not in self.window.states:
                width = declared_width(site) or widths.get(site.key)
                if width is None:
                    raise RuntimeError(f"`{site.name}` saw no row on this rank and does not declare its width.")
                self.window.states[site.key] = self._empty_state(width, torch.float32, self.device)

    def _sequence_counts(self, process_group: dist.ProcessGroup | None, world_size: int) -> tuple[dict[str, int], int]:
        """Sequences by bucket and forward passes, over all ranks."""
        counts_K = self.window.sequences_K
        if counts_K is None:
            counts_K = torch.zeros(len(self.grouping.names) + 1, dtype=torch.int64, device=self.device)
        counts_K = torch.cat([counts_K, counts_K.new_tensor([self.window.num_passes])])
        if world_size > 1:
            dist.all_reduce(counts_K, group=process_group)
        *counts, num_passes = counts_K.tolist()
        return dict(zip(self.buckets.reported, counts, strict=False)), num_passes

    def _bucket_losses(self, process_group: dist.ProcessGroup | None, world_size: int) -> list[BucketLoss]:
        if self.window.losses is None:
            return []
        if world_size > 1:
            self.window.losses.reduce_(self.device, process_group)
        sums = self.window.losses.result()
        return [BucketLoss(name, *values) for name, values in zip(self.buckets.reported, sums, strict=False)]


def declared_width(site: Site) -> int | None:
    """Features of a site as its module declares them (``Linear``, Hugging Face's ``Conv1D``), or ``None``."""
    names = ("in_features", "nx") if site.site == "post" else ("out_features", "nf")
    widths = [getattr(site.module, name, None) for name in names]
    return next((width for width in widths if isinstance(width, int)), None)


def _real_positions(ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
    if mask_BT is None:
        return torch.ones_like(ids_BT, dtype=torch.bool)
    if mask_BT.shape != ids_BT.shape:
        raise ValueError(
            f"The padding mask has shape {tuple(mask_BT.shape)} but the model was given ids of shape "
            f"{tuple(ids_BT.shape)}: pass a `mask_fn(batch)` that returns one value per id."
        )
    return mask_BT.to(device=ids_BT.device, dtype=torch.bool)


def _forget_compiled_code(model: nn.Module) -> None:
    """Code that torch.compile made before the hooks existed would run without them."""
    if any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in model.modules()):
        import torch._dynamo

        torch._dynamo.reset()
