"""The one life of a measurement, whatever loop it watches; the loop's shell says when things happen.

``attach`` finds the sites, agrees with the other ranks and opens the run folder: what is wrong by configuration is an
error there. From then on nothing is raised (but for ``on_nonfinite="raise"`` and ``strict``): what goes wrong becomes a
record with a status and one warning per kind, and where the ranks can no longer agree the observer stands down on all
of them.

A window is one optimizer step with all its micro-batches, or one evaluation::

    begin_step(step) -> begin_micro_batch() -> [pause() -> resume()] -> end_micro_batch(batch) -> end_step()
    begin_evaluation(stage) -> begin_evaluation_batch(loader) -> end_evaluation_batch(batch) -> end_evaluation(step)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_spectral.functional.products import is_full_precision
from lightning_spectral.models.calls import ForwardCall
from lightning_spectral.probe.adapters import BatchAdapter
from lightning_spectral.probe.agreement import Agreement, MissingRankError, wait_limit
from lightning_spectral.probe.background import BackgroundSolver, has_free_core
from lightning_spectral.probe.guard import DeliberateError, Guard
from lightning_spectral.probe.host import Host, Scalars
from lightning_spectral.probe.probe import NOT_RUN, OpenWindow, Seen, SpectralProbe, merge
from lightning_spectral.probe.publish import publish
from lightning_spectral.probe.records_of import WindowId
from lightning_spectral.probe.run_folder import RunFolder
from lightning_spectral.probe.run_start import open_folder
from lightning_spectral.probe.schedule import Schedule
from lightning_spectral.probe.settings import Measurement
from lightning_spectral.probe.token_counts import StreamCounts, TokenCounter
from lightning_spectral.probe.window import ClosedWindow, SiteResult
from lightning_spectral.text import one_line

LOST = ("no_forward", "not_matched", "solve_failed")  # statuses of a window that gave no number


@dataclass
class _Window:
    """An open window: of the step about to be taken, or of one dataloader of an evaluation."""

    step: int | None
    tokens_seen: int | None
    num_micro_batches: int = 0
    trouble: tuple[str, str] | None = None
    note: str = ""  # what was seen but not understood
    contents: OpenWindow | None = None  # while another window is in the probe


@dataclass
class _Evaluation:
    """An evaluation under way: one window per dataloader, and the training window that it interrupts."""

    stage: str
    interrupted: OpenWindow
    windows: dict[int | None, _Window] = field(default_factory=dict)
    current: int | None = None


class Observer:
    """Measures one model in one loop.

    Args:
        measurement: What, when and where.
        name: Who speaks in warnings, e.g. the callback's class.
        key: What the ranks must have in common; default: ``name`` and what is measured.

    Attributes:
        state: ``off``, ``armed``, or ``failed`` when it stood down.
        schedule: When training is measured.
        tokens: Training tokens so far.
        run_folder: Where records go, once attached; kept after :meth:`detach` for further stages of the same run.
    """

    def __init__(self, measurement: Measurement, *, name: str, key: str = "") -> None:
        self.measurement, self.name = measurement, name
        self._key = key or f"{name}{measurement.identity}"
        self.state: Literal["off", "armed", "failed"] = "off"
        self.schedule = Schedule(measurement.settings.every_n_steps)
        self.tokens = TokenCounter()
        self.stream = StreamCounts() if measurement.buckets is not None and measurement.buckets.is_stream else None
        self.ordinals: dict[str, list[int | None]] = {}  # by stage: the step evaluated last, and how often
        self.run_folder: RunFolder | None = None
        self.num_windows = self.num_lost_windows = 0
        self.guard = Guard(name, strict=measurement.settings.strict)
        self._adapter = BatchAdapter(measurement.settings.mask_fn)
        self._probe: SpectralProbe | None = None
        self._host: Host | None = None
        self._agreement: Agreement | None = None
        self._solver: BackgroundSolver | None = None
        self._window: _Window | None = None
        self._evaluation: _Evaluation | None = None
        self._unlogged: Scalars = {}
        self._trains, self._folder_is_open = True, False

    # start

    def attach(self, model: nn.Module, host: Host, *, fallback_counts: Any = None, trains: bool = True) -> None:
        """Find what is to be measured and open the run folder. Every rank must come, or nobody measures.

        Args:
            model: Module that holds the blocks, wrapped or not.
            host: The loop.
            fallback_counts: Token counts to use where the user gave none.
            trains: Whether steps will be taken.

        Raises:
            ValueError: What is asked for cannot be measured in this model; the message says what to do.
        """
        self._host, self.guard.tell = host, host.tell
        self._agreement = Agreement(self._key)
        probe, refusal = None, ""
        try:
            probe = self._make_probe(model, fallback_counts)
            beside = trains and self._solves_beside(probe, host)
            self._check_memory(probe, twice=beside)
        except ValueError as error:
            refusal, beside = str(error) or type(error).__name__, False
        try:
            said = {"refusal": refusal, "beside": beside, "folder": str(host.folder), "run_id": host.run_id}
            parts = self._agreement.exchange("attach", said)
        except MissingRankError as error:
            _remove(probe)
            self._stand_down(f"{error}: the others measure nothing. Add it on every rank")
            return
        refusals = {rank: part["refusal"] for rank, part in enumerate(parts) if part["refusal"]}
        if refusals:
            _remove(probe)
            raise ValueError(refusal or f"rank {min(refusals)}: {refusals[min(refusals)]}")
        assert probe is not None
        self._probe = probe
        if all(part["beside"] for part in parts):
            self._solver = BackgroundSolver(alone=self._agreement.world_size == 1)
        host.folder, host.run_id = parts[0]["folder"], parts[0]["run_id"]
        self._trains, self._folder_is_open = trains, False
        try:
            if not host.opens_late:
                self._open_folder()
        except MissingRankError as error:
            self._stand_down(f"{error} to open the run folder; nothing is measured")
            return
        except ValueError:
            self.detach()
            raise
        self.state = "armed"
        host.inform(self._said_at_start(probe))

    @property
    def is_armed(self) -> bool:
        """Whether anything is measured at all."""
        return self.state == "armed"

    @property
    def step(self) -> int | None:
        """Step of the open training window; ``None`` where none is open."""
        return None if self._window is None else self._window.step

    @property
    def probe(self) -> SpectralProbe | None:
        """The measuring object, while attached."""
        return self._probe

    # training

    def begin_step(self, step: int, *, is_last: bool = False) -> None:
        """Before the first micro-batch of an optimizer step; further calls within it change nothing."""
        if not self.is_armed or self._window is not None or "train" not in self.measurement.settings.on:
            return
        if self.schedule.is_due(step) or (is_last and step != self.schedule.previous):
            self._window = _Window(step, self.tokens.seen)
            self.guard.take()
            with self.guard("opening a window"):
                self._armed_probe.begin()

    def begin_micro_batch(self) -> None:
        """Before a forward pass with its loss."""
        if self._window is not None and self.is_armed:
            with self.guard("starting a micro-batch"):
                self._start(self._window, training=True)

    def pause(self) -> None:
        """Before a backward pass or anything else that is not the micro-batch's own forward."""
        if self._window is not None and self._probe is not None:
            with self.guard("pausing"):
                self._probe.pause()

    def resume(self) -> None:
        """After it."""
        if self._window is not None and self._probe is not None:
            with self.guard("resuming"):
                self._probe.resume()

    def end_micro_batch(self, batch: Any, *, counts_tokens: bool = True) -> None:
        """After a micro-batch: accumulate what it left behind, count its tokens.

        Args:
            batch: What the script was given, or what the model was called with.
            counts_tokens: Whether its tokens are new ones.
        """
        if not self.is_armed:
            return
        if self._window is not None:
            self._collect(batch)
        if counts_tokens:
            with self.guard("counting tokens"):
                self.tokens.add(batch, self._armed_host.num_replicas)
                if self.stream is not None:
                    self.stream.add(batch)

    def end_step(self) -> None:
        """After the optimizer step: close the window, if one is open, solve and publish it."""
        window, self._window = self._window, None
        if window is None or not self.is_armed:
            self.poll()
            return
        self.schedule.previous = window.step
        self._unlogged |= self._publish("train", window, None, 0)

    def poll(self) -> None:
        """Publish what has been solved meanwhile."""
        if self._solver is not None:
            with self.guard("publishing a window"):
                self._unlogged |= self._solver.poll()

    def take_scalars(self) -> Scalars:
        """Medians published since the last call."""
        scalars, self._unlogged = self._unlogged, {}
        return scalars

    def count_ahead(self, ids: Sequence[Tensor]) -> None:
        """Before step 1, with ``counts="stream"``: count these ids for all. Every rank must call it.

        Args:
            ids: This rank's; empty where it knows none, which leaves the counts to the training batches.
        """
        if self.stream is None or not self.is_armed or self._agreement is None:
            return
        for part in ids:
            self.stream.add_ids(part)
        try:
            parts = self._agreement.exchange("counts", {"known": bool(ids)})
        except MissingRankError as error:
            self._stand_down(f"{error} to add token counts; nothing is measured")
            return
        if all(part["known"] for part in parts):
            self.stream.reduce(self._armed_host.process_group, self._armed_probe.device, whole=True)

    # evaluation

    def begin_evaluation(self, stage: str) -> None:
        """Before the first batch; the training window that it interrupts is put aside, measured or not."""
        if not self.is_armed or self._probe is None:
            return
        with self.guard("beginning an evaluation"):
            self._probe.pause()
            if stage in self.measurement.settings.on:
                self._evaluation = _Evaluation(stage, self._probe.begin())

    def begin_evaluation_batch(self, loader: int | None = None) -> None:
        """Before a batch of a dataloader; ``None`` where there is only one."""
        evaluation = self._evaluation
        if evaluation is None or not self.is_armed:
            return
        with self.guard("starting a batch of an evaluation"):
            self._switch(evaluation, loader)
            self._start(evaluation.windows[loader], training=False)

    def end_evaluation_batch(self, batch: Any) -> None:
        """After a batch."""
        if self._evaluation is not None and self.is_armed:
            self._collect(batch, self._evaluation.windows.get(self._evaluation.current))

    def end_evaluation(self, step: int | None, tokens_seen: int | None = None, *, num_loaders: int = 1) -> Scalars:
        """After the last batch: close, solve and publish a window per dataloader.

        Args:
            step: Optimizer steps that the weights have seen, if known.
            tokens_seen: Training tokens that they have seen, if known.
            num_loaders: Equal on all ranks, of which one may have seen no batch.

        Returns:
            The medians, for a monitor.
        """
        evaluation, self._evaluation = self._evaluation, None
        if evaluation is None or self._probe is None:
            return {}
        scalars: Scalars = {}
        ordinal = self._next_ordinal(evaluation.stage, step)
        for loader in range(num_loaders) if num_loaders > 1 else (None,):
            with self.guard("closing an evaluation"):
                self._switch(evaluation, loader)
            window = replace(evaluation.windows.get(loader) or _Window(step, None), step=step, tokens_seen=tokens_seen)
            if self.is_armed:
                scalars |= self._publish(evaluation.stage, window, loader, ordinal)
        if self._probe is not None:
            self._probe.window = evaluation.interrupted
        return scalars

    # end, state

    def drain(self) -> None:
        """Wait for the window that is being solved, and publish it."""
        if self._solver is not None:
            with self.guard("publishing a window"):
                self._unlogged |= self._solver.drain()

    def after_error(self) -> None:
        """The loop has raised: publish what needs no other rank, leave nothing behind."""
        with self.guard("publishing the last window"):
            if self._solver is not None and not self._solver.drain_after_error():
                self.num_lost_windows += 1
                self.guard.say("lost", "the window that was being solved is lost: it needs all ranks.")
        self.detach()

    def detach(self, *, finished: bool | None = None, last_step: int | None = None) -> None:
        """Take the hooks off, free the state, give the run folder back.

        Args:
            finished: Whether the run has reached its end, where that is known.
            last_step: Optimizer steps done.
        """
        solver, self._solver = self._solver, None
        with self.guard("ending the solver"):
            if solver is not None:
                solver.close()
        probe, self._probe = self._probe, None
        self._window = self._evaluation = None
        with self.guard("taking the hooks off"):
            _remove(probe)
        if self.state != "off" and self.run_folder is not None:
            with self.guard("closing the run folder", "not_written"):
                facts = {"finished": finished, "last_step": last_step} if finished is not None else {}
                windows = {"num_windows": self.num_windows, "num_lost_windows": self.num_lost_windows}
                self.run_folder.close(**facts, **windows)
        self.state = "off"

    def abandon_window(self) -> None:
        """Forget the open window: the loop goes on from elsewhere."""
        self._window = None
        with self.guard("abandoning a window"):
            self._armed_probe.begin()

    def continue_run(self) -> None:
        """Go on with the records that are in the folder, if it is not open yet."""
        if self._host is not None:
            self._host.resume = True

    def forget(self) -> None:
        """A run of its own begins: nothing of an earlier one is carried on."""
        self.schedule.previous = None
        self.tokens = TokenCounter()
        self.ordinals = {}
        if self.stream is not None:
            self.stream = StreamCounts()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on."""
        state = {"previous": self.schedule.previous, "ordinals": self.ordinals, **self.tokens.state_dict()}
        return state if self.stream is None else {**state, "counts": self.stream.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.schedule.previous = state["previous"]
        self.ordinals = dict(state.get("ordinals", {}))
        self.tokens.load_state_dict(state)
        if self.stream is not None and "counts" in state:
            self.stream.load_state_dict(state["counts"])

    # inside: windows

    @property
    def _armed_probe(self) -> SpectralProbe:
        assert self._probe is not None
        return self._probe

    @property
    def _armed_host(self) -> Host:
        assert self._host is not None
        return self._host

    def _start(self, window: _Window, *, training: bool) -> None:
        step = window.step if training and window.step is not None else 0
        seed = (self.measurement.settings.seed * 1_000_003 + step) * 1_009 + window.num_micro_batches
        window.num_micro_batches += 1
        self._armed_probe.start(seed=seed, training=training)

    def _collect(self, batch: Any, window: _Window | None = None) -> None:
        window = window or self._window
        with self.guard("accumulating activations", "not_matched"):
            calls = self._armed_probe.collect(partial(self._mask, batch), partial(self._targets, batch))
            self.tokens.learn(batch, calls)
            for kind, note in self._armed_probe.recorder.notes.items():
                self.guard.say(kind, note)
                if window is not None:
                    window.note = window.note or note
        if window is not None:
            window.trouble = window.trouble or self.guard.take()

    def _mask(self, batch: Any, call: ForwardCall) -> Tensor | None:
        if call.mask is not None and self.measurement.settings.mask_fn is None:
            return call.mask
        return self._adapter.mask(batch, call.ids, call.shape)

    def _targets(self, batch: Any, call: ForwardCall) -> Tensor | None:
        return self._adapter.targets(batch, call.ids, call.shape)

    def _switch(self, evaluation: _Evaluation, loader: int | None) -> None:
        """Put the window of a dataloader into the probe.

        Each stays open until the evaluation ends, since ranks come to the next dataloader at different times.
        """
        probe = self._armed_probe
        if loader in evaluation.windows and loader == evaluation.current:
            return
        if evaluation.current in evaluation.windows:
            evaluation.windows[evaluation.current].contents = probe.begin()
        else:
            probe.begin()
        window = evaluation.windows.setdefault(loader, _Window(None, None))
        if window.contents is not None:
            probe.window, window.contents = window.contents, None
        evaluation.current = loader

    def _next_ordinal(self, stage: str, step: int | None) -> int:
        """How many evaluations of this stage there were at this step, in this run."""
        last, count = self.ordinals.get(stage, (None, None))
        if count is None and self.run_folder is not None:
            ordinal = 0 if self._trains else self.run_folder.next_ordinal(stage, step)
        else:
            ordinal = (count or 0) + 1 if last == step else 0
        self.ordinals[stage] = [step, ordinal]
        return ordinal

    # inside: closing

    def _publish(self, stage: str, window: _Window, loader: int | None, ordinal: int) -> Scalars:
        """Close the window on all ranks, solve it now or in the background, publish; returns what is known by now."""
        self.num_windows += 1
        closed = self._close(window)
        if closed is not None and not self._folder_is_open:
            with self.guard("opening the run folder", "not_written"):
                self._open_folder()
        if closed is None or self.run_folder is None or not self._folder_is_open:
            self.num_lost_windows += 1
            return {}
        window_id = WindowId(self.run_folder.run_id, stage, window.step, window.tokens_seen, loader, ordinal)
        release = partial(self._publish_result, self.num_windows, window_id, closed, self._is_settled)
        if stage == "train" and self.stream is not None and not closed.lost:
            with self.guard("counting tokens"):  # after the window's own status is known, on all ranks
                self.stream.reduce(self._armed_host.process_group, self._armed_probe.device)
        with self.guard("publishing a window"):
            if self._solver is None:
                return release(closed.solve())
            if stage == "train" and is_full_precision(self._armed_probe.device):
                return self._solver.submit(closed.solve, release)
            self._unlogged |= self._solver.drain()  # records stay in the order of the windows
            return release(closed.solve())
        return {}

    def _close(self, window: _Window) -> ClosedWindow | None:
        """The window, closed alike on all ranks; ``None`` where they could not agree and stood down."""
        probe, agreement = self._armed_probe, self._agreement
        assert agreement is not None
        said: dict[str, Any] = {"seen": asdict(Seen())}
        with self.guard("closing a window"):
            seen = probe.settle(alone=agreement.world_size == 1 or not self.measurement.options.reduce)
            said = {"seen": asdict(seen)}
        trouble = window.trouble or self.guard.take()
        said |= {"trouble": trouble, "note": window.note}
        try:
            parts = agreement.exchange(f"window {self.num_windows}", said)
        except MissingRankError as error:
            self._stand_down(f"{error} when a window ended; nothing more is measured")
            return None
        for part in parts:  # a rank that saw something and understood nothing would be left out in silence
            if part["note"] and not part["seen"]["num_passes"]:
                part["trouble"] = part["trouble"] or ("not_matched", part["note"])
        troubles = [(rank, *part["trouble"]) for rank, part in enumerate(parts) if part["trouble"]]
        if troubles:
            rank, status, reason = troubles[0]
            return probe.lose(status, reason if len(parts) == 1 else f"rank {rank}: {reason}")
        agreed = merge([Seen(**part["seen"]) for part in parts])
        if not agreed.num_passes:
            return probe.lose("no_forward", agreed.reason or NOT_RUN)
        return probe.close(self._armed_host.process_group, agreed)

    def _publish_result(
        self, number: int, window: WindowId, closed: ClosedWindow, is_settled: bool, owned: list[SiteResult]
    ) -> Scalars:
        """On the training thread, on all ranks: share the results, write and log them."""
        assert self._agreement is not None
        assert self.run_folder is not None
        host = self._armed_host
        try:
            self._agreement.exchange(f"results {number}", {}, limit_s=wait_limit(closed.busy_s))
        except MissingRankError as error:
            self._stand_down(f"{error} to exchange results; nothing more is measured")
            self.num_lost_windows += 1
            return {}
        result = closed.share(owned)
        conventions = self.measurement.conventions
        if self.stream is not None:
            result, conventions = self.stream.label(result, conventions, settled=is_settled)
        records, scalars = publish(
            self.run_folder,
            result,
            window,
            conventions,
            host,
            self.guard,
            with_eigenvalues=self.measurement.settings.eigenvalues,
        )
        self.num_lost_windows += bool(records) and all(record.status in LOST for record in records)
        self._react(records)
        return scalars

    @property
    def _is_settled(self) -> bool:
        return self.stream is None or self.stream.table_V is not None

    def _react(self, records: list[Any]) -> None:
        bad = [record for record in records if record.status == "nonfinite"]
        lost = [record for record in records if record.status in LOST]
        if self.measurement.settings.strict and lost:
            raise DeliberateError(f"{self.name}: step {lost[0].step}: `{lost[0].status}`: {lost[0].reason}")
        for status in dict.fromkeys(record.status for record in lost):
            first = next(record for record in lost if record.status == status)
            share = f"{len(lost)} of {len(records)} spectra"
            self.guard.say(status, f"step {first.step}: {share} have status `{status}`: {first.reason}.")
        if not bad:
            return
        share = f"{len(bad)} of {len(records)} spectra"
        message = (
            f"NaN or Inf activations at step {bad[0].step} in `{bad[0].module}` ({share}); recorded with status "
            "`nonfinite`."
        )
        if self.measurement.settings.on_nonfinite == "raise":
            raise DeliberateError(f"{self.name}: {message}")
        if self.measurement.settings.on_nonfinite == "warn":
            self.guard.say("nonfinite", message)

    # inside: start

    def _make_probe(self, model: nn.Module, fallback_counts: Any) -> SpectralProbe:
        if self.stream is None:
            return SpectralProbe(model, self.measurement.grouping(fallback_counts), self.measurement.options)
        assert self.measurement.buckets is not None
        return self.stream.make_probe(model, self.measurement)

    def _open_folder(self) -> None:
        assert self._agreement is not None
        settings = self.measurement.settings
        self.run_folder = open_folder(
            self._armed_host, self._agreement, labels=settings.labels, conventions=self.measurement.conventions
        )
        self._folder_is_open = True

    def _solves_beside(self, probe: SpectralProbe, host: Host) -> bool:
        """Whether training windows are solved in another thread."""
        settings = self.measurement.settings
        if settings.background is False or settings.on_nonfinite == "raise" or settings.strict:
            return False
        if settings.background:
            return True
        limit, state = settings.memory_limit_mib, probe.state_mib
        fits = limit is None or (state is not None and 2 * state <= limit)
        return host.may_solve_beside and fits and has_free_core(probe.device, host.num_local_processes)

    def _check_memory(self, probe: SpectralProbe, *, twice: bool) -> None:
        limit, needed = self.measurement.settings.memory_limit_mib, probe.state_mib
        if needed is not None and twice:
            needed *= 2  # one window is solved while the next one fills
        if limit is not None and needed is not None and needed > limit:
            _remove(probe)
            raise ValueError(
                f"needs {needed:.1f} MiB in a window ({len(probe.sites)} sites x {probe.buckets.num_groups} "
                f"groups x 9/16 D^2 x 4 bytes), `memory_limit_mib` allows {limit:.1f}: measure fewer layers "
                "(`modules=[...]`), one site, or fewer jackknife groups."
            )

    def _stand_down(self, reason: str) -> None:
        """Nothing more is measured, and the loop runs on."""
        self.guard.say("stood down", f"{one_line(reason)}.", on_every_rank=True)
        if self._solver is not None:
            self._solver.abandon()
            self._solver = None
        probe, self._probe = self._probe, None
        _remove(probe)
        self._window = self._evaluation = None
        self.state = "failed"
        if self.measurement.settings.strict:
            raise DeliberateError(f"{self.name}: {reason}")

    def _said_at_start(self, probe: SpectralProbe) -> str:
        sites, folder = probe.sites, self.run_folder
        state = "unknown before the first forward" if probe.state_mib is None else f"{probe.state_mib:.1f} MiB"
        products = "".join(f"products of width {width} by {choice}; " for width, choice in probe.products.items())
        return (
            f"{self.name}: {len(sites)} sites ({sites[0].name} ... {sites[-1].name}), state in a window {state} and up "
            f"to {probe.waiting_mib:.1f} MiB of rows, every {self.schedule.every_n_steps} steps on "
            f"{', '.join(self.measurement.settings.on)}; {products}"
            f"{'solved in the background; ' if self._solver else ''}records in `{folder.path if folder else None}`."
        )


def _remove(probe: SpectralProbe | None) -> None:
    if probe is not None:
        with torch.no_grad():
            probe.remove()
