"""The one life of a measurement, whatever loop it watches; the loop's shell says when things happen.

``attach`` finds the sites, agrees with the other ranks and opens the run folder: what is wrong by configuration is an
error there. From then on nothing is raised (but for ``on_nonfinite="raise"`` and ``strict``): what goes wrong becomes a
record with a status and one warning per kind, and where the ranks can no longer agree the observer is disabled on all
of them.

A window is one optimizer step with all its micro-batches, or one evaluation::

    begin_step(step) -> begin_micro_batch() -> [pause() -> resume()] -> end_micro_batch(batch) -> end_step()
    begin_evaluation(stage) -> begin_evaluation_batch(loader) -> end_evaluation_batch(batch) -> end_evaluation(step)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from lightning_spectral.probe.agreement import Agreement, MissingRankError
from lightning_spectral.probe.attaching import agree_to_measure, remove, said_at_start
from lightning_spectral.probe.background import BackgroundSolver
from lightning_spectral.probe.evaluation import Evaluation, Ordinals, WindowState
from lightning_spectral.probe.guard import DeliberateError, Guard
from lightning_spectral.probe.host import Host, Scalars
from lightning_spectral.probe.measurement import Measurement
from lightning_spectral.probe.micro_batch import MicroBatches
from lightning_spectral.probe.probe import SpectralProbe
from lightning_spectral.probe.publication import Publication, Tally
from lightning_spectral.probe.run_folder import RunFolder
from lightning_spectral.probe.schedule import Schedule
from lightning_spectral.probe.token_counts import StreamCounts, TokenCounter
from lightning_spectral.text import one_line


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
        tally: Windows so far, and those of them that gave no number.
        run_folder: Where records go, once attached; kept after :meth:`detach` for further stages of the same run.
    """

    def __init__(self, measurement: Measurement, *, name: str, key: str = "") -> None:
        self.measurement, self.name = measurement, name
        self._key = key or f"{name}{measurement.identity}"
        self.state: Literal["off", "armed", "failed"] = "off"
        self.schedule = Schedule(measurement.settings.every_n_steps)
        self.tokens = TokenCounter()
        self.stream = StreamCounts() if measurement.buckets is not None and measurement.buckets.is_stream else None
        self.run_folder: RunFolder | None = None
        self.guard = Guard(name, strict=measurement.settings.strict)
        self.tally = Tally()
        self._micro_batches = MicroBatches(measurement.settings, self.guard)
        self._out: Publication | None = None
        self._window: WindowState | None = None
        self._evaluation: Evaluation | None = None
        self._ordinals = Ordinals()
        self._num_evaluations = 0
        self._unlogged: Scalars = {}
        self._taken: dict[str, Any] = {}  # what a checkpoint held that could not be written before it
        self._trains = True

    def attach(self, model: nn.Module, host: Host, *, fallback_counts: Any = None, trains: bool = True) -> None:
        """Find what is to be measured and open the run folder; a collective: every rank must call it.

        Args:
            model: Module that holds the blocks, wrapped or not.
            host: The loop.
            fallback_counts: Token counts to use where the user gave none.
            trains: Whether steps will be taken.

        Raises:
            ValueError: What is asked for cannot be measured in this model; the message says what to do.
        """
        self.guard.tell, self._trains = host.tell, trains
        agreement = Agreement(self._key)
        shared: Any = {"stream": self.stream, "tally": self.tally, "stand_down": self._stand_down}
        try:
            probe, beside = agree_to_measure(
                model, self.measurement, host, agreement, self.stream, fallback_counts, trains=trains
            )
            self._out = Publication(self.measurement, self.guard, probe, host, agreement, **shared)
            if beside:
                self._out.solver = BackgroundSolver(alone=agreement.world_size == 1)
            if not host.opens_late:
                self.run_folder = self._out.open_folder()
                self._take_back()
        except MissingRankError as error:
            self._stand_down(f"{error}: the others measure nothing. Add it on every rank")
            return
        except ValueError:
            self.detach()
            raise
        self.state = "armed"
        said = said_at_start(self.measurement, self.name, probe, self.run_folder, beside=beside, is_first=host.is_first)
        host.inform(said)

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
        return None if self._out is None else self._out.probe

    # training

    def begin_step(self, step: int, *, is_last: bool = False) -> None:
        """Before the first micro-batch of an optimizer step; further calls within it change nothing."""
        self.tokens.begin_step(step)
        if self._window is not None or not self.is_armed or "train" not in self.measurement.settings.on:
            return
        if self.schedule.is_due(step) or (is_last and step != self.schedule.previous):
            self._window = WindowState(step, self.tokens.seen)
            self.guard.take()
            with self.guard("opening a window"):
                self._armed.probe.turn = -(-step // self.schedule.every_n_steps)  # of the last step too
                self._armed.probe.begin()

    def give_ids(self, ids: Tensor, *, may_raise: bool = True) -> None:
        """Before the forward passes of a batch: its token ids, for a pipeline stage that sees none.

        Args:
            ids: (B, T).
            may_raise: Whether the training has not begun.

        Raises:
            ValueError: If they are no ids; later the records say so.
        """
        if not self.is_armed:
            return
        try:
            self._micro_batches.given.add(ids)
        except ValueError:
            if may_raise:
                raise
            return
        self.tokens.give(ids)

    def begin_micro_batch(self, *, waits: bool = False) -> None:
        """Before a forward pass with its loss; with ``waits`` it may be long until then, or never."""
        if self._window is not None and self.is_armed:
            with self.guard("starting a micro-batch"):
                self._micro_batches.start(self._armed.probe, self._window, training=True, waits=waits)

    def pause(self) -> None:
        """Before a backward pass or anything else that is not the micro-batch's own forward."""
        if self._window is not None and self._out is not None:
            with self.guard("pausing"):
                self._out.probe.pause()

    def resume(self, *, losses: bool = False) -> None:
        """After it; with ``losses`` also before a forward pass that was waited for."""
        if self._window is not None and self._out is not None:
            with self.guard("resuming"):
                self._out.probe.resume(losses=losses)

    def end_forward(self) -> None:
        """After a forward pass of the loop's module that counts: losses may come."""
        if self._window is not None and self._out is not None:
            with self.guard("looking for losses"):
                self._out.probe.end_forward()

    def begin_update(self) -> None:
        """Before the optimizer moves the weights, where its step has run the micro-batch, too."""
        if self._window is not None and self._out is not None:
            with self.guard("pausing"):
                self._out.probe.begin_update()

    def end_micro_batch(self, batch: Any, *, counts_tokens: bool = True) -> None:
        """After a micro-batch: accumulate what it left behind, count its tokens.

        Args:
            batch: What the script was given, or what the model was called with.
            counts_tokens: Whether its tokens are new ones.
        """
        if not self.is_armed:
            return
        if self._window is not None:
            self._micro_batches.collect(self._armed.probe, batch, self._window, self.tokens, evaluates=False)
        if counts_tokens:
            with self.guard("counting tokens"):
                if reason := self.tokens.add(batch, self._armed.host.num_replicas):
                    self.guard.say("counting tokens", f"{reason}.")
                if self.stream is not None:
                    self.stream.add(batch)

    def end_step(self) -> None:
        """After the optimizer step: close the window, if one is open, solve and publish it."""
        window, self._window = self._window, None
        self._micro_batches.given.clear()
        if window is None or not self.is_armed:
            self.poll()
            return
        self.schedule.previous = window.step
        self._unlogged |= self._publish("train", window, None, 0)

    def poll(self) -> None:
        """Publish what has been solved meanwhile."""
        if self._out is not None and self._out.solver is not None:
            with self.guard("publishing a window"):
                self._unlogged |= self._out.solver.poll()

    def take_scalars(self) -> Scalars:
        """Medians published since the last call."""
        scalars, self._unlogged = self._unlogged, {}
        return scalars

    def count_ahead(self, ids: Sequence[Tensor]) -> None:
        """Before step 1, with ``counts="stream"``: count these ids for all. Every rank must call it.

        Args:
            ids: This rank's; empty where it knows none, which leaves the counts to the training batches.
        """
        if self.stream is None or not self.is_armed:
            return
        for part in ids:
            self.stream.add_ids(part)
        try:
            parts = self._armed.agreement.exchange("counts", {"known": bool(ids)})
            if all(part["known"] for part in parts):
                self.stream.reduce(self._armed.host.process_group, self._armed.probe.device, whole=True)
        except MissingRankError as error:
            self._stand_down(f"{error} to add token counts; nothing is measured")

    # evaluation

    def begin_evaluation(self, stage: str) -> None:
        """Before the first batch; the training window that it interrupts is put aside, measured or not."""
        if not self.is_armed:
            return
        with self.guard("beginning an evaluation"):
            self._armed.probe.pause()
            if stage in self.measurement.settings.on:
                self._armed.probe.turn = self._num_evaluations
                self._num_evaluations += 1
                self._evaluation = Evaluation(stage, self._armed.probe.begin())

    def begin_evaluation_batch(self, loader: int | None = None) -> None:
        """Before a batch of a dataloader; ``None`` where there is only one."""
        evaluation = self._evaluation
        if evaluation is None or not self.is_armed:
            return
        with self.guard("starting a batch of an evaluation"):
            evaluation.switch(self._armed.probe, loader)
            self._micro_batches.start(self._armed.probe, evaluation.windows[loader], training=False)

    def end_evaluation_batch(self, batch: Any) -> None:
        """After a batch."""
        if self._evaluation is not None and self.is_armed:
            window = self._evaluation.windows.get(self._evaluation.current)
            self._micro_batches.collect(self._armed.probe, batch, window, self.tokens, evaluates=True)

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
        if evaluation is None or self._out is None:
            return {}
        scalars: Scalars = {}
        ordinal = self._ordinals.next(evaluation.stage, step, self.run_folder, trains=self._trains)
        for loader in range(num_loaders) if num_loaders > 1 else (None,):
            if not self.is_armed:
                break
            with self.guard("closing an evaluation"):
                evaluation.switch(self._armed.probe, loader)
            window = evaluation.windows.get(loader) or WindowState(step, None)
            window = replace(window, step=step, tokens_seen=tokens_seen)
            scalars |= self._publish(evaluation.stage, window, loader, ordinal)
        if self.is_armed:
            self._armed.probe.window = evaluation.interrupted
        return scalars

    # end, state

    def drain(self, *, alone: bool = False) -> None:
        """Wait for the window that is being solved, and publish it; every rank must call it.

        Args:
            alone: Do so only where no other rank is needed: any rank may call it.
        """
        if self._out is not None and self._out.solver is not None:
            with self.guard("publishing a window"):
                self._unlogged |= self._out.solver.drain_alone() if alone else self._out.solver.drain()

    def after_error(self) -> None:
        """The loop has raised: publish what needs no other rank, leave nothing behind."""
        out = self._out
        with self.guard("publishing the last window"):
            if out is not None and out.solver is not None and not out.solver.drain_after_error():
                self.tally.lost += 1
                self.guard.say("lost", "the window that was being solved is lost: it needs all ranks.")
        self.detach()

    def detach(self, *, finished: bool | None = None, last_step: int | None = None) -> None:
        """Take the hooks off, free the state, give the run folder back.

        Args:
            finished: Whether the run has reached its end, where that is known.
            last_step: Optimizer steps done.
        """
        out, self._out = self._out, None
        self._window = self._evaluation = None
        if out is not None:
            with self.guard("ending the solver"):
                if out.solver is not None:
                    out.solver.close()
            with self.guard("taking the hooks off"):
                remove(out.probe)
        if self.state != "off" and self.run_folder is not None:
            with self.guard("closing the run folder", "not_closed"):
                facts = {"finished": finished, "last_step": last_step} if finished is not None else {}
                windows = {"num_windows": self.tally.windows, "num_lost_windows": self.tally.lost}
                self.run_folder.close(**facts, **windows)
        self.state = "off"

    def abandon_window(self) -> None:
        """Forget the open window: the loop goes on from elsewhere."""
        self._window = None
        self._micro_batches.given.clear()
        with self.guard("abandoning a window"):
            self._armed.probe.begin()

    def forget(self) -> None:
        """A run of its own begins: nothing of an earlier one is carried on."""
        self.schedule.previous = None
        self.tokens = TokenCounter()
        self._ordinals = Ordinals()
        self._taken = {}
        if self.stream is not None:
            self.stream = StreamCounts()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on."""
        state = {"previous": self.schedule.previous, "ordinals": self._ordinals.last, **self.tokens.state_dict()}
        if self.run_folder is not None and self.run_folder.waiting:
            state["waiting"] = self.run_folder.waiting
        return state if self.stream is None else {**state, "counts": self.stream.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.schedule.previous = state["previous"]
        self._ordinals = Ordinals(state.get("ordinals"))
        self.tokens.load_state_dict(state)
        self._taken = state.get("waiting", {})
        if self.stream is not None and "counts" in state:
            self.stream.load_state_dict(state["counts"])

    @property
    def _armed(self) -> Publication:
        assert self._out is not None
        return self._out

    def _publish(self, stage: str, window: WindowState, loader: int | None, ordinal: int) -> Scalars:
        out = self._armed
        scalars = out.publish(stage, window, loader, ordinal)
        self.run_folder = out.run_folder or self.run_folder
        self._take_back()
        self._unlogged |= out.earlier
        out.earlier = {}
        return scalars

    def _take_back(self) -> None:
        if self.run_folder is not None and self._taken:
            taken, self._taken = self._taken, {}
            with self.guard(f"writing to `{self.run_folder.path}`", "not_written"):
                self.run_folder.take_back(taken)

    def _stand_down(self, reason: str) -> None:
        """Nothing more is measured, and the loop runs on."""
        self.guard.say("stood down", f"{one_line(reason)}.", on_every_rank=True)
        out, self._out = self._out, None
        if out is not None:
            if out.solver is not None:
                out.solver.abandon()
            remove(out.probe)
        self._window = self._evaluation = None
        self.state = "failed"
        if self.measurement.settings.strict:
            raise DeliberateError(f"{self.name}: {reason}")
