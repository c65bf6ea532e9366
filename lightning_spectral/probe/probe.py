"""The measurement itself, without a loop: hooks in, ranks out. ``observer.Observer`` gives it a life in any loop.

``begin`` a window, ``start`` and ``collect`` around each micro-batch, then ``end`` it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_spectral.functional.products import Calibration
from lightning_spectral.models.calls import ForwardCall
from lightning_spectral.models.recorder import Recorder
from lightning_spectral.models.sites import Site
from lightning_spectral.models.stacks import find_stacks, num_ids
from lightning_spectral.probe.accumulate import Accumulator
from lightning_spectral.probe.collectives import all_reduce
from lightning_spectral.probe.grouping import Grouping, check_vocabulary
from lightning_spectral.probe.loss_watch import LossWatch
from lightning_spectral.probe.memory_plan import MemoryPlan
from lightning_spectral.probe.open_window import OpenWindow, Seen, StackSeen, by_stack, sequence_counts
from lightning_spectral.probe.options import ProbeOptions
from lightning_spectral.probe.places import groups_of, of_rows
from lightning_spectral.probe.results import BucketLoss, WindowResult
from lightning_spectral.probe.row_sample import RowSample
from lightning_spectral.probe.vocabulary import num_known_ids
from lightning_spectral.probe.window import Buckets, ClosedWindow

NOT_RUN = "the model did not run in this window, or a compiled one skipped hooks"


# what a caller can say about a forward call: its padding mask, or the token that each place is to predict
OfCall = Callable[[ForwardCall], Tensor | None]
# which of a micro-batch's forward calls count, and what is to be said of the others
Choice = Callable[[Sequence[ForwardCall]], tuple[list[ForwardCall], dict[str, str]]]


class SpectralProbe:
    """Hooks on one model and the moments that they feed.

    Args:
        model: Module that holds the blocks, wrapped or not.
        grouping: Which bucket a row belongs to.
        options: What to measure.
        is_part: The model is a part of one, in which nothing need be measured.

    Attributes:
        window: What the open window holds; another one may be put in its place.
        plan: How rows are held; ``None`` for all of them, as moments.
        turn: Of the windows that begin from now on, where layers take turns; equal on all ranks.

    Raises:
        ValueError: If no site is found, or the token counts are of another tokenizer.
    """

    def __init__(self, model: nn.Module, grouping: Grouping, options: ProbeOptions, *, is_part: bool = False) -> None:
        self.grouping, self.options = grouping, options
        self.buckets = Buckets(grouping.names, options.num_jackknife_groups)
        self.found = find_stacks(
            model,
            sites=options.sites,
            modules=options.modules,
            embedding=options.embedding,
            hints=options.hints,
            is_part=is_part,
        )
        vocab = num_ids(self.found.embedding)
        if grouping.vocab_size is not None and vocab is not None:
            check_vocabulary(grouping.vocab_size, vocab, num_known_ids(model))
        self.recorder = Recorder(model, self.found, token_fraction=options.token_fraction)
        self._any_parameter = next(model.parameters(), torch.zeros(()))
        _forget_compiled_code()
        self._losses = LossWatch(self.found, grouping, watches=options.with_losses)
        self._rows = Accumulator(lambda: self.sites, self.buckets.num_groups, self._parameter)
        self.plan: MemoryPlan | None = None
        self.turn = 0
        self._seed = 0
        self.window = OpenWindow()
        self.begin()

    @property
    def products(self) -> dict[int, Calibration]:
        """The product chosen for each width that is known before the first forward."""
        return self._rows.products

    @property
    def state_mib(self) -> float | None:
        """Memory of the moments during a window, MiB; ``None`` if a width is not known before the first forward."""
        return self._rows.state_mib

    @property
    def layers_mib(self) -> dict[int, float]:
        """Of it, what the sites of each depth take."""
        return self._rows.layers_mib

    @property
    def waiting_mib(self) -> float:
        """Rows that may wait for a product, as fp32, MiB: a model in bf16 keeps half of it."""
        return self._rows.waiting_mib

    def hold(self, plan: MemoryPlan) -> None:
        """Hold the rows of every window as the plan says; equal on all ranks."""
        self.plan = plan
        self._rows.on_host = plan.on_host
        if plan.num_rows is not None:
            self.recorder.keep_at_most(plan.rows_per_rank)

    def begin(self) -> OpenWindow:
        """Start a window with nothing in it; the one open before is returned, to be put back as ``window``."""
        self.recorder.discard()
        before = self.window
        self.window = OpenWindow(losses=self._losses.empty(), turn=self.turn)
        return before

    def start(self, seed: int, *, training: bool = True, waits: bool = False) -> None:
        """Before a micro-batch of the window.

        Args:
            seed: Draws the kept rows; must be equal on all ranks.
            training: Count only forwards with gradients, of modules in training mode; ``False`` counts every forward.
            waits: Look for losses only once the model runs: it may be long until then, or never.
        """
        self._seed = seed
        first = around = None
        if self.recorder.is_left_eagerly:
            around = self._losses.start_outside(training=training)
        elif waits:
            first = self._losses.starter(training=training)
        else:
            self._losses.start(training=training)
        self.recorder.start(seed=seed, training=training, first=first, around=around)

    def pause(self) -> None:
        """Before the backward pass, whose recomputation must not be counted."""
        self.recorder.pause()
        self._losses.pause()

    def resume(self, *, losses: bool = False) -> None:
        """After the backward pass.

        Args:
            losses: Look for losses also where that was waited with.
        """
        self.recorder.resume()
        if self.recorder.open:
            self._losses.resume(also_unopened=losses)

    def end_forward(self) -> None:
        """After the forward pass of the outermost module, where the loop knows which that is."""
        self._losses.end_forward()

    def begin_update(self) -> None:
        """Before the optimizer moves the weights, within its step."""
        self._losses.begin_update()

    def collect(
        self, mask_of: OfCall | None = None, targets_of: OfCall | None = None, choose: Choice | None = None
    ) -> list[ForwardCall]:
        """After a micro-batch: accumulate its rows.

        Args:
            mask_of: False where a place of the call is padding, of the call's ``shape``; ``None``: the call's own.
            targets_of: The token to predict at each place; ``None``: the next one of the sequence.
            choose: Which calls count; ``None``: all.

        Returns:
            The forward calls that count, with what they say about ids, layout and arguments.
        """
        began = time.perf_counter()
        with torch.inference_mode(False), torch.no_grad():
            scored = self._losses.scored()
            calls = self.recorder.collect()
            if choose is not None:
                calls, notes = choose(calls)
                self.recorder.notes.update(notes)
            self._losses.add(self.window.losses, scored, calls)
            for call in calls:
                self._take(call, mask_of, targets_of)
            if self.window.num_waiting >= self._rows.waiting_rows:
                self._rows.flush(self.window)
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
        self.window.unseen = self.recorder.replaced() | self.window.unseen
        with torch.inference_mode(False), torch.no_grad():
            self._rows.flush(self.window, to_be_added=not alone)
        self.window.busy_s += time.perf_counter() - began
        return Seen(
            sum(seen.num_calls for seen in self.window.stacks.values()),
            {key: state.width for key, state in self.window.states.items()}
            if self.window.sample is None
            else self.window.sample.widths,
            dict(self.window.unmatched),
            {site.key: (site.name, site.site, site.layer, site.run) for site in self.sites if site.run},
            "" if self.window.stacks else " ".join(self.recorder.notes.values()),
            self._rows.in_doubles(self.window),
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
            agreed: What all ranks together saw (:func:`~lightning_spectral.probe.open_window.merge`): only sites of
                which a rank saw a row are reduced, those at depths that another rank saw are known here too, and what
                one rank could not match none reports.

        Raises:
            RuntimeError: If a site saw no row on this rank and nothing says how wide it is.
        """
        began = time.perf_counter()
        with torch.inference_mode(False), torch.no_grad():
            world_size = self._world_size(process_group)
            if agreed is not None:
                self.window.unmatched |= agreed.unmatched
                self.recorder.know(agreed.deeper)
            stacks, reported = {site.stack for site in self.sites}, self.buckets.reported
            counts = sequence_counts(self.window, stacks, reported, self.device)
            if world_size > 1:
                all_reduce(counts, process_group)
            num_sequences, num_passes = by_stack(counts, stacks, reported)
            if num_passes == 0 and self.sites:
                return self.lose("no_forward", NOT_RUN)
            if self._samples:
                self._open_sample()
            elif world_size > 1:
                self._rows.complete(self.window, agreed, self.device)
                # with nobody to say who saw what, every site has a state by now
                self.window.states = {
                    site.key: self.window.states[site.key]
                    for site in self.sites
                    if site.key in self.window.states and self._in_turn(site, self.window)
                }
            losses = []
            if self.window.losses is not None:
                if world_size > 1:
                    self.window.losses.reduce_(self.device, process_group)
                losses = self.window.losses.result(reported)
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

    def remove(self) -> None:
        """Take the hooks off and free the state."""
        self.begin()
        self.recorder.remove()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._parameter.device

    @property
    def row_dtype(self) -> torch.dtype:
        """Type that rows are likely to have: that of the weights, or of autocast where it is on now."""
        device = self.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        return torch.get_autocast_dtype(device) if autocast else self._parameter.dtype

    @property
    def sites(self) -> list[Site]:
        """What is measured; grows when a shared or looped layer is seen to run at a further depth."""
        return self.recorder.sites

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
            states=dict(window.states),
            sample=window.sample,
            buckets=self.buckets,
            num_sequences=num_sequences,
            dtypes=window.dtypes,
            losses=losses,
            options=self.options,
            process_group=process_group,
            world_size=world_size,
            unmatched=window.unmatched,
            unseen=window.unseen,
            layouts={name: (seen.layout, seen.agreement) for name, seen in window.stacks.items()},
            ids={name: seen.ids for name, seen in window.stacks.items()},
            waiting={site.key for site in self.sites if not self._in_turn(site, window)},
            device=self.device if self._rows.on_host else None,
        )

    def _world_size(self, process_group: dist.ProcessGroup | None) -> int:
        distributed = self.options.reduce and dist.is_available() and dist.is_initialized()
        return dist.get_world_size(process_group) if distributed else 1

    @property
    def _parameter(self) -> Tensor:
        """A parameter of the first measured module, for its device and dtype."""
        modules = [site.module for site in self.sites]
        return next((p for module in modules for p in module.parameters()), self._any_parameter)

    def _take(self, call: ForwardCall, mask_of: OfCall | None, targets_of: OfCall | None) -> None:
        seen = self.window.stacks.setdefault(call.stack, StackSeen())
        seen.num_calls += 1
        self.window.unseen |= call.unseen
        self._losses.saw(call)
        mask = None if mask_of is None else mask_of(call)
        targets = None if targets_of is None or call.ids is None else targets_of(call)
        mask = call.mask if mask is None else mask
        groups_P, texts_P = groups_of(call, seen, self.grouping, self.buckets, mask, targets)
        if self._samples:
            self._sample(call, groups_P, texts_P)
            return
        groups: dict[int, Tensor] = {}  # sites whose rows are in the same order share one tensor
        num_rows = 0
        for site in self.sites:
            rows_ND = call.rows.get(site.key)
            if rows_ND is None or not self._in_turn(site, self.window):
                continue
            self.window.dtypes[site.key] = str(rows_ND.dtype).removeprefix("torch.")
            places_N = call.places[site.key]
            num_rows = max(num_rows, 0 if site.is_routed else len(rows_ND))
            if call.ids is None and len(self.grouping.names) > 1:
                self.window.unmatched.setdefault(site.key, call.reason)
            if site.key in call.unmatched:
                self.window.unmatched.setdefault(site.key, call.unmatched[site.key])
                self._rows.take(self.window, site, rows_ND, torch.zeros_like(places_N))
                continue
            if id(places_N) not in groups:
                groups[id(places_N)] = of_rows(groups_P, places_N)
            self._rows.take(self.window, site, rows_ND, groups[id(places_N)])
        self.window.num_waiting += num_rows

    def _in_turn(self, site: Site, window: OpenWindow) -> bool:
        turns = 1 if self.plan is None else self.plan.turns
        return site.layer % turns == window.turn % turns

    @property
    def _samples(self) -> bool:
        return self.plan is not None and self.plan.num_rows is not None

    def _sample(self, call: ForwardCall, groups_P: Tensor, texts_P: Tensor) -> None:
        """Keep a part of the call's rows."""
        present = [site for site in self.sites if site.key in call.rows]
        for site in present:
            self.window.dtypes[site.key] = str(call.rows[site.key].dtype).removeprefix("torch.")
            if call.ids is None and len(self.grouping.names) > 1:
                self.window.unmatched.setdefault(site.key, call.reason)
        self.window.unmatched = {**call.unmatched, **self.window.unmatched}
        self._open_sample().add_all(call, present, groups_P, texts_P)

    def _open_sample(self) -> RowSample:
        """That of the open window; every rank draws its own."""
        assert self.plan is not None
        if self.window.sample is None:
            rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
            self.window.sample = RowSample(
                self.plan.limit_bytes, self.buckets.num_groups, 1_009 * self._seed + rank, self.options.token_fraction
            )
        return self.window.sample


def _forget_compiled_code() -> None:
    """Code that torch.compile made before the hooks existed would run without them, functions included."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()
