"""The measurement itself, without Lightning: taps in, ranks out. Callbacks and Fabric loops drive the same object.

``begin`` a window, ``start`` and ``collect`` around each micro-batch, then ``end`` it.

Axes: B sequences, T positions, N rows, D features, K buckets.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_spectral.functional.buckets import EXCLUDED, sort_by_group, target_ids
from lightning_spectral.functional.covariance import Moments, empty_moments, update_
from lightning_spectral.functional.packed import packed_size
from lightning_spectral.functional.products import Calibration, calibrate, strips
from lightning_spectral.functional.sample import Gram, gram
from lightning_spectral.models.calls import ForwardCall
from lightning_spectral.models.recorder import Recorder
from lightning_spectral.models.stacks import Found, Site, find_stacks
from lightning_spectral.probe.grouping import Grouping, check_vocabulary
from lightning_spectral.probe.loss_tap import LossTap
from lightning_spectral.probe.losses import BucketLosses
from lightning_spectral.probe.options import ProbeOptions
from lightning_spectral.probe.window import BucketLoss, Buckets, ClosedWindow, WindowResult

# A product over fewer rows moves more memory than it multiplies: rows wait until there are this many.
FLUSH_ROWS = 2_048
NOT_RUN = "the model did not run in this window, or a compiled one skipped hooks"


# what a caller can say about a forward call: its padding mask, or the token that each place is to predict
OfCall = Callable[[ForwardCall], Tensor | None]


@dataclass
class StackSeen:
    """What a window has seen of one stack.

    Attributes:
        num_calls: Forward calls.
        num_sequences: Sequences dealt to shards so far.
        sequences_K: Sequences with rows in each bucket, and in any.
        layout: How rows were matched to tokens in the first call.
        agreement: Smallest share of rows that the match was proven for.
    """

    num_calls: int = 0
    num_sequences: int = 0
    sequences_K: Tensor | None = None
    layout: str = ""
    agreement: float | None = None


@dataclass
class OpenWindow:
    """What a window has accumulated so far; all keys but those of ``stacks`` are ``Site.key``.

    Attributes:
        unmatched: Why rows of a site could not be matched to tokens. All of them are in the first bucket: pooled
            numbers are right, those of the buckets are ``not_matched``.
    """

    states: dict[str, Moments | Gram] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    waiting: dict[str, list[Tensor]] = field(default_factory=dict)
    groups: dict[str, list[Tensor]] = field(default_factory=dict)
    stacks: dict[str, StackSeen] = field(default_factory=dict)
    unmatched: dict[str, str] = field(default_factory=dict)
    losses: BucketLosses | None = None
    num_waiting: int = 0
    busy_s: float = 0.0


@dataclass(frozen=True)
class Seen:
    """What one rank saw in a window.

    Attributes:
        num_passes: Forward calls.
        widths: Features of each site that had a row, by site key.
        unmatched: Why rows could not be matched to tokens, by site key; sites whose rows all were are absent.
        deeper: Name, site, depth and run of sites that only running has shown (shared and looped layers), by key.
        reason: Why nothing was seen, where there is a reason to tell.
    """

    num_passes: int = 0
    widths: dict[str, int] = field(default_factory=dict)
    unmatched: dict[str, str] = field(default_factory=dict)
    deeper: dict[str, tuple[str, str, int, int]] = field(default_factory=dict)
    reason: str = ""


def merge(parts: Sequence[Seen]) -> Seen:
    """What all ranks together saw; equal on all of them."""
    unmatched: dict[str, str] = {}
    for part in parts:
        unmatched = part.unmatched | unmatched  # the first rank's reason
    widths = {key: width for part in parts for key, width in part.widths.items()}
    deeper = {key: place for part in parts for key, place in part.deeper.items()}
    reason = next((part.reason for part in parts if part.reason), "")
    return Seen(sum(part.num_passes for part in parts), widths, unmatched, deeper, reason)


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
        self.found = find_stacks(model, sites=options.sites, modules=options.modules, embedding=options.embedding)
        vocab = getattr(self.found.embedding, "num_embeddings", None)
        if grouping.vocab_size is not None and vocab is not None:
            check_vocabulary(grouping.vocab_size, vocab, _num_known_ids(model))
        self.recorder = Recorder(model, self.found, token_fraction=options.token_fraction)
        _forget_compiled_code()
        self._loss_tap = LossTap(_vocab_sizes(self.found, grouping), self._keep_loss) if options.with_losses else None
        self._scored: list[tuple[Tensor, Tensor, Tensor]] = []
        self._last_shape: tuple[int, ...] = (0, 0)
        self.products = self._choose_products()
        self._waiting_rows = self._rows_to_wait_for()
        self.window = OpenWindow()
        self.begin()

    @property
    def state_mib(self) -> float | None:
        """Memory of the moments during a window, MiB; ``None`` if a width is not known before the first forward."""
        widths = [site.width for site in self.sites]
        if None in widths:
            return None
        return sum(4 * self.buckets.num_groups * packed_size(width) for width in widths if width) / 2**20

    @property
    def waiting_mib(self) -> float:
        """Rows that may wait for a product, as fp32, MiB: a model in bf16 keeps half of it."""
        widths = sum(site.width or 0 for site in self.sites if not site.is_routed)
        return 4 * self._waiting_rows * widths / 2**20

    def begin(self) -> OpenWindow:
        """Start a window with nothing in it; the one open before is returned, to be put back as ``window``."""
        self.recorder.discard()
        self._stop_losses()
        before = self.window
        self.window = OpenWindow(losses=BucketLosses(len(self.grouping.names)) if self.options.with_losses else None)
        return before

    def start(self, seed: int, *, training: bool = True) -> None:
        """Before a micro-batch of the window.

        Args:
            seed: Draws the kept rows; must be equal on all ranks.
            training: Count only forwards with gradients, of modules in training mode; ``False`` counts every forward.
        """
        self.recorder.start(seed=seed, training=training)
        if self._loss_tap is not None:
            self._loss_tap.start(training=training)

    def pause(self) -> None:
        """Before the backward pass, whose recomputation must not be counted."""
        self.recorder.pause()
        if self._loss_tap is not None:
            self._loss_tap.stop()

    def resume(self) -> None:
        """After the backward pass."""
        self.recorder.resume()
        if self._loss_tap is not None:
            self._loss_tap.start(training=self._loss_tap.training)

    def collect(self, mask_of: OfCall | None = None, targets_of: OfCall | None = None) -> list[ForwardCall]:
        """After a micro-batch: accumulate its rows.

        Args:
            mask_of: False where a place of the call is padding, of the call's ``shape``; ``None``: the call's own.
            targets_of: The token to predict at each place; ``None``: the next one of the sequence.

        Returns:
            The forward calls, with what they say about ids, layout and arguments.
        """
        began = time.perf_counter()
        with torch.inference_mode(False), torch.no_grad():
            scored = self._stop_losses()
            calls = self.recorder.collect()
            for losses, right, targets in scored:
                self._take_losses(losses, right, targets, calls)
            for call in calls:
                self._take(call, mask_of, targets_of)
                self._last_shape = call.shape if len(call.shape) == 2 else self._last_shape
            if self.window.num_waiting >= self._waiting_rows:
                self._flush()
        self.window.busy_s += time.perf_counter() - began
        return calls

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
        return Seen(
            sum(seen.num_calls for seen in self.window.stacks.values()),
            {key: state.width for key, state in self.window.states.items()},
            dict(self.window.unmatched),
            {site.key: (site.name, site.site, site.layer, site.run) for site in self.sites if site.run},
            "" if self.window.stacks else " ".join(self.recorder.notes.values()),
        )

    def close(
        self,
        process_group: dist.ProcessGroup | None = None,
        agreed: Seen | None = None,
    ) -> ClosedWindow:
        """Add the states of all ranks; what is left is to solve the window and to share the results.

        Every rank of the group must call it, after :meth:`settle`.

        Args:
            process_group: Default: the world.
            agreed: What all ranks together saw (:func:`merge`): only sites of which a rank saw a row are reduced, those
                at depths that another rank saw are known here too, and what one rank could not match none reports.

        Raises:
            RuntimeError: If a site saw no row on this rank and nothing says how wide it is.
        """
        began = time.perf_counter()
        with torch.inference_mode(False), torch.no_grad():
            world_size = self._world_size(process_group)
            if agreed is not None:
                self.window.unmatched |= agreed.unmatched
                self.recorder.know(agreed.deeper)
            num_sequences, num_passes = self._sequence_counts(process_group, world_size)
            if num_passes == 0:
                return self.lose("no_forward", NOT_RUN)
            if world_size > 1:
                self._complete_states(agreed)
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
        num_sequences: Mapping[str, Mapping[str, int]],
        process_group: dist.ProcessGroup | None,
        world_size: int,
    ) -> ClosedWindow:
        ran = {site.stack for site in self.sites if not num_sequences or num_sequences.get(site.stack)}
        return ClosedWindow(
            sites=[site for site in self.sites if site.stack in ran],
            states=window.states,
            buckets=self.buckets,
            num_sequences=num_sequences,
            dtypes=window.dtypes,
            losses=losses,
            options=self.options,
            process_group=process_group,
            world_size=world_size,
            unmatched=window.unmatched,
            layouts={name: (seen.layout, seen.agreement) for name, seen in window.stacks.items()},
        )

    def _world_size(self, process_group: dist.ProcessGroup | None) -> int:
        distributed = self.options.reduce and dist.is_available() and dist.is_initialized()
        return dist.get_world_size(process_group) if distributed else 1

    def remove(self) -> None:
        """Take the hooks off and free the state."""
        self.begin()
        self.recorder.remove()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._parameter.device

    @property
    def sites(self) -> list[Site]:
        """What is measured; grows when a shared or looped layer is seen to run at a further depth."""
        return self.recorder.sites

    @property
    def _parameter(self) -> Tensor:
        """A parameter of the first measured module, for its device and dtype."""
        modules = [site.module for site in self.sites]
        return next((p for module in modules for p in module.parameters()), torch.zeros(()))

    def _keep_loss(self, losses: Tensor, right: Tensor, targets: Tensor) -> None:
        self._scored.append((losses, right, targets))

    def _stop_losses(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """What the script has scored since the start; sees no more of it."""
        if self._loss_tap is not None:
            self._loss_tap.stop()
        scored, self._scored = self._scored, []
        return scored

    def _take_losses(self, losses_N: Tensor, right_N: Tensor, targets: Tensor, calls: list[ForwardCall]) -> None:
        if self.grouping.by_place:  # the position of a prediction is known where there is one for each place of a call
            shape = next((call.shape for call in reversed(calls) if len(call.shape) == 2), self._last_shape)
            shorter = (shape[0], shape[1] - 1)
            fitting = [size for size in (shape, shorter) if targets.numel() == size[0] * size[1]]
            if not fitting:
                return
            targets = targets.reshape(fitting[0])
        assert self.window.losses is not None
        self.window.losses.add(losses_N, right_N, self.grouping.loss_codes(targets).flatten())

    def _take(self, call: ForwardCall, mask_of: OfCall | None, targets_of: OfCall | None) -> None:
        seen = self.window.stacks.setdefault(call.stack, StackSeen())
        seen.num_calls += 1
        mask = None if mask_of is None else mask_of(call)
        real_P = _real_places(call, call.mask if mask is None else mask)
        codes_P = self._codes(call, seen, real_P, targets_of)
        groups_P = self._groups(call, seen, codes_P)
        groups_of: dict[int, Tensor] = {}
        for site in self.sites:
            rows_ND = call.rows.get(site.key)
            if rows_ND is None:
                continue
            self.window.dtypes[site.key] = str(rows_ND.dtype).removeprefix("torch.")
            places_N = call.places[site.key]
            if call.ids is None and len(self.grouping.names) > 1:
                self.window.unmatched.setdefault(site.key, call.reason)
            if site.key in call.unmatched:
                self.window.unmatched.setdefault(site.key, call.unmatched[site.key])
                self._add(site, rows_ND, *sort_by_group(torch.zeros_like(places_N), self.buckets.num_groups))
                continue
            if site.is_routed:
                # Each expert has its own few tokens: their rows cannot wait with the others'.
                self._add(site, rows_ND, *sort_by_group(_of_rows(groups_P, places_N), self.buckets.num_groups))
                continue
            groups_N = groups_of.get(id(places_N))
            if groups_N is None:
                groups_N = groups_of[id(places_N)] = _of_rows(groups_P, places_N)
            self.window.waiting.setdefault(site.key, []).append(rows_ND)
            self.window.groups.setdefault(site.key, []).append(groups_N)
        self.window.num_waiting += max((len(groups_N) for groups_N in groups_of.values()), default=0)

    def _codes(self, call: ForwardCall, seen: StackSeen, real_P: Tensor, targets_of: OfCall | None) -> Tensor:
        """Bucket of each place ``(P,)``; those of a call without ids are all in the first group."""
        if call.ids is None:
            return torch.where(real_P, 0, EXCLUDED)
        seen.layout = seen.layout or call.layout
        if call.agreement is not None:
            seen.agreement = call.agreement if seen.agreement is None else min(seen.agreement, call.agreement)
        ids_BT = call.ids if call.ids.ndim == 2 else call.ids.reshape(1, -1)
        targets_BT = None if targets_of is None else targets_of(call)
        if targets_BT is None or targets_BT.shape != ids_BT.shape:
            targets_BT = target_ids(ids_BT)
        real_BT = real_P.view_as(ids_BT)
        return torch.where(real_BT, self.grouping.codes(ids_BT, targets_BT), EXCLUDED).flatten()

    def _groups(self, call: ForwardCall, seen: StackSeen, codes_P: Tensor) -> Tensor:
        """Bucket codes -> group indices ``(P,)``: sequences are dealt to the shards in turn."""
        present = _places_with_rows(call, codes_P)
        num_codes = len(self.grouping.names)
        sequences_K = codes_P.new_zeros(num_codes + 1)
        for code in (*range(num_codes), None):
            member_P = present & (codes_P >= 0 if code is None else codes_P == code)
            of_sequence = codes_P.new_zeros(call.num_sequences)
            of_sequence.index_add_(0, call.sequences_P, member_P.to(codes_P.dtype))
            sequences_K[num_codes if code is None else code] = (of_sequence > 0).sum()
        seen.sequences_K = sequences_K if seen.sequences_K is None else seen.sequences_K + sequences_K
        shard_P = (call.sequences_P + seen.num_sequences) % self.buckets.num_jackknife_groups
        seen.num_sequences += call.num_sequences
        return torch.where(codes_P >= 0, codes_P * self.buckets.num_jackknife_groups + shard_P, EXCLUDED)

    def _flush(self, to_be_added: bool = True) -> None:
        """Multiply the rows that wait. ``to_be_added``: more rows may come, from here or from other ranks."""
        sorted_by: dict[tuple[int, ...], tuple[list[int], Tensor | None]] = {}  # one sort serves all sites alike
        for site in self.sites:
            waiting, groups = self.window.waiting.get(site.key), self.window.groups.get(site.key)
            if not waiting or not groups:
                continue
            same = tuple(id(groups_N) for groups_N in groups)
            if same not in sorted_by:
                sorted_by[same] = sort_by_group(torch.cat(groups), self.buckets.num_groups)
            sizes, order_M = sorted_by[same]
            rows_ND = waiting[0] if len(waiting) == 1 else torch.cat(waiting)
            waiting.clear()
            if not to_be_added and site.key not in self.window.states and sum(sizes) < rows_ND.shape[1]:
                self.window.states[site.key] = gram(rows_ND, sizes, order_M)
            else:
                self._add(site, rows_ND, sizes, order_M)
        self.window.groups.clear()
        self.window.num_waiting = 0

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
        widths = [site.width for site in self.sites]
        groups = self.buckets.num_groups
        return max([FLUSH_ROWS, *(min(width, groups * packed_size(width) // width) for width in widths if width)])

    def _choose_products(self) -> dict[int, Calibration]:
        """The fastest correct product for each width that is known before the first forward."""
        parameter = self._parameter
        widths = sorted({width for site in self.sites if (width := site.width) is not None})
        if parameter.dtype == torch.float64:
            return {}
        return {width: calibrate(width, device=parameter.device, activations=parameter.dtype) for width in widths}

    def _empty_state(self, width: int, dtype: torch.dtype, device: torch.device) -> Moments:
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        return empty_moments(self.buckets.num_groups, width, dtype=dtype, device=device)

    def _complete_states(self, agreed: Seen | None) -> None:
        """A rank that saw no row of a site still takes part in its reduction."""
        for site in self.sites:
            if site.key not in self.window.states and (agreed is None or site.key in agreed.widths):
                width = site.width or (None if agreed is None else agreed.widths[site.key])
                if width is None:
                    raise RuntimeError(f"`{site.name}` saw no row on this rank and does not declare its width.")
                self.window.states[site.key] = self._empty_state(width, torch.float32, self.device)

    def _sequence_counts(
        self, process_group: dist.ProcessGroup | None, world_size: int
    ) -> tuple[dict[str, dict[str, int]], int]:
        """Sequences of each reported bucket by stack, and forward calls, over all ranks."""
        stacks = sorted({site.stack for site in self.sites})
        counts_SK = torch.zeros(len(stacks), len(self.grouping.names) + 2, dtype=torch.int64, device=self.device)
        for counts_K, name in zip(counts_SK, stacks, strict=True):
            seen = self.window.stacks.get(name)
            if seen is not None and seen.sequences_K is not None:
                counts_K[:-1] = seen.sequences_K
                counts_K[-1] = seen.num_calls
        if world_size > 1:
            dist.all_reduce(counts_SK, group=process_group)
        reported = self.buckets.reported
        by_stack = {
            name: dict(zip(reported, counts, strict=False))
            for name, counts in zip(stacks, counts_SK.tolist(), strict=True)
            if counts[-1]  # a copy of the model that did not run has no records
        }
        return by_stack, int(counts_SK[:, -1].sum())

    def _bucket_losses(self, process_group: dist.ProcessGroup | None, world_size: int) -> list[BucketLoss]:
        if self.window.losses is None:
            return []
        if world_size > 1:
            self.window.losses.reduce_(self.device, process_group)
        sums = self.window.losses.result()
        seen = any(num_tokens for num_tokens, _, _ in sums)
        return [
            BucketLoss(name, *values, status="ok" if values[0] else "empty" if seen else "not_matched")
            for name, values in zip(self.buckets.reported, sums, strict=False)
        ]


def _of_rows(values_P: Tensor, places_N: Tensor) -> Tensor:
    """What is said of each place, for each row; rows that are no place are left out."""
    return torch.where(places_N >= 0, values_P[places_N.clamp(min=0)], EXCLUDED)


def _places_with_rows(call: ForwardCall, codes_P: Tensor) -> Tensor:
    present = torch.zeros_like(codes_P, dtype=torch.bool)
    for places_N in {id(places_N): places_N for places_N in call.places.values()}.values():
        present[places_N[places_N >= 0]] = True
    return present


def _real_places(call: ForwardCall, mask: Tensor | None) -> Tensor:
    """False where a place is padding, ``(P,)``."""
    if mask is None:
        return torch.ones_like(call.sequences_P, dtype=torch.bool)
    if tuple(mask.shape) != call.shape:
        raise ValueError(
            f"The padding mask has shape {tuple(mask.shape)} but the model was given ids of shape "
            f"{call.shape}: pass a `mask_fn(batch)` that returns one value per id."
        )
    return mask.to(device=call.sequences_P.device, dtype=torch.bool).flatten()


def _num_known_ids(model: nn.Module) -> int | None:
    """Ids of the tokenizer, where a model says how many of those that it embeds are padding (litgpt)."""
    configs = [config for module in model.modules() if (config := getattr(module, "config", None)) is not None]
    padded = [config for config in configs if hasattr(config, "padded_vocab_size")]
    return getattr(padded[0], "vocab_size", None) if padded else None


def _forget_compiled_code() -> None:
    """Code that torch.compile made before the hooks existed would run without them, functions included."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()


def _vocab_sizes(found: Found, grouping: Grouping) -> set[int]:
    """Widths that logits over the vocabulary can have."""
    sizes = [grouping.vocab_size, getattr(found.embedding, "num_embeddings", None)]
    sizes.append(getattr(found.head, "out_features", None))
    return {size for size in sizes if isinstance(size, int)}
