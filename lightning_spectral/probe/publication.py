"""From an open window to its records, alike on all ranks: agree, close, solve (now or in a thread), share, write.

Ranks agree before anything moves. Where one does not answer, nothing more can be measured:
``stand_down`` is called with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from lightning_spectral.functional.products import is_full_precision
from lightning_spectral.probe.agreement import Agreement, MissingRankError, wait_limit
from lightning_spectral.probe.background import BackgroundSolver
from lightning_spectral.probe.cost import Cost
from lightning_spectral.probe.evaluation import WindowState
from lightning_spectral.probe.guard import DeliberateError, Guard
from lightning_spectral.probe.host import Host, Scalars
from lightning_spectral.probe.measurement import Measurement
from lightning_spectral.probe.open_window import Seen, merge
from lightning_spectral.probe.probe import NOT_RUN, SpectralProbe
from lightning_spectral.probe.publish import publish
from lightning_spectral.probe.records_of import WindowId
from lightning_spectral.probe.results import SiteResult
from lightning_spectral.probe.row_shares import unlike_counts
from lightning_spectral.probe.run_folder import RunFolder
from lightning_spectral.probe.run_start import open_folder
from lightning_spectral.probe.token_counts import StreamCounts
from lightning_spectral.probe.window import ClosedWindow
from lightning_spectral.records import SpectralRecord

LOST = ("no_forward", "not_matched", "solve_failed")  # statuses of a window that gave no number


@dataclass
class Tally:
    """Windows of a run: closed so far, and those of them that gave no number."""

    windows: int = 0
    lost: int = 0


class Publication:
    """What becomes of the windows of one model in one loop.

    Args:
        measurement: What is measured.
        guard: Keeps errors from the loop.
        probe: What holds the open window.
        host: The loop.
        agreement: With the other ranks.
        stream: Token counts that are still being taken, if any.
        tally: Added to.
        stand_down: Called with the reason where the ranks can no longer agree.

    Attributes:
        run_folder: Where records go, once open.
        solver: Solves windows in a thread, if any may be.
        earlier: Medians of a training window that an evaluation had to wait for.
    """

    def __init__(
        self,
        measurement: Measurement,
        guard: Guard,
        probe: SpectralProbe,
        host: Host,
        agreement: Agreement,
        *,
        stream: StreamCounts | None,
        tally: Tally,
        stand_down: Callable[[str], None],
    ) -> None:
        self.measurement, self.guard, self.probe, self.host, self.agreement = measurement, guard, probe, host, agreement
        self.run_folder: RunFolder | None = None
        self.solver: BackgroundSolver | None = None
        self.earlier: Scalars = {}
        self._tally, self._cost = tally, Cost(measurement.settings.every_n_steps)
        self._stream, self._stand_down = stream, stand_down

    def open_folder(self) -> RunFolder:
        """The run's folder. Every rank must call it.

        Raises:
            ValueError: If it cannot be written.
            MissingRankError: If not every rank comes.
        """
        labels, conventions = self.measurement.settings.labels, self.measurement.conventions
        self.run_folder = open_folder(self.host, self.agreement, labels=labels, conventions=conventions)
        return self.run_folder

    def publish(self, stage: str, window: WindowState, loader: int | None, ordinal: int) -> Scalars:
        """Close the window on all ranks, solve it now or in the background, publish; returns what is known by now."""
        self._tally.windows += 1
        closed = self._close(window)
        if closed is not None and self.run_folder is None:
            with self.guard("opening the run folder", "not_opened"):
                self.open_folder()
        if closed is None or self.run_folder is None:
            self._tally.lost += 1
            return {}
        window_id = WindowId(self.run_folder.run_id, stage, window.step, window.tokens_seen, loader, ordinal)
        is_settled = self._stream is None or self._stream.table_V is not None
        release = partial(self._release, self._tally.windows, window_id, closed, is_settled)
        if stage == "train" and self._stream is not None and not closed.lost:
            with self.guard("counting tokens"):  # after the window's own status is known, on all ranks
                self._stream.reduce(self.host.process_group, self.probe.device)
        with self.guard("publishing a window"):
            if self.solver is None:
                return release(closed.solve())
            if stage == "train" and is_full_precision(self.probe.device):
                return self.solver.submit(closed.solve, release, self.run_folder.solving)
            self.earlier |= self.solver.drain()  # records stay in the order of the windows
            return release(closed.solve())
        return {}

    def _close(self, window: WindowState) -> ClosedWindow | None:
        """The window, closed alike on all ranks; ``None`` where they could not agree and stood down."""
        alone = self.agreement.world_size == 1 or not self.measurement.options.reduce
        said: dict[str, Any] = {"seen": asdict(Seen())}
        with self.guard("closing a window"):
            said = {"seen": asdict(self.probe.settle(alone=alone))}
        said |= {"trouble": window.trouble or self.guard.take(), "note": window.note}
        try:
            parts = self.agreement.exchange(f"window {self._tally.windows}", said)
            closed = self._closed_as_agreed(parts)
            closed.is_stage = self.host.is_stage
            return closed
        except MissingRankError as error:
            self._stand_down(f"{error} when a window ended; nothing more is measured")
            return None

    def _closed_as_agreed(self, parts: Sequence[dict[str, Any]]) -> ClosedWindow:
        for part in parts:  # a rank that saw something and understood nothing would be left out in silence
            if part["note"] and not part["seen"]["num_passes"]:
                part["trouble"] = part["trouble"] or ("not_matched", part["note"])
        troubles = [(rank, *part["trouble"]) for rank, part in enumerate(parts) if part["trouble"]]
        if troubles:
            rank, status, reason = troubles[0]
            return self.probe.lose(status, reason if len(parts) == 1 else f"rank {rank}: {reason}")
        ranks = self.host.group_ranks
        agreed = merge([Seen(**part["seen"]) for part in ([parts[rank] for rank in ranks] if ranks else parts)])
        if not agreed.num_passes and self.probe.sites:
            return self.probe.lose("no_forward", agreed.reason or NOT_RUN)
        return self.probe.close(self.host.process_group, agreed)

    def _release(
        self, number: int, window: WindowId, closed: ClosedWindow, is_settled: bool, owned: list[SiteResult]
    ) -> Scalars:
        """On the training thread, on all ranks: share the results, write and log them."""
        assert self.run_folder is not None
        try:
            self.agreement.exchange(f"results {number}", {}, limit_s=wait_limit(closed.busy_s))
            result = closed.share(owned)
        except MissingRankError as error:
            self._stand_down(f"{error} to exchange results; nothing more is measured")
            self._tally.lost += 1
            return {}
        conventions = self.measurement.conventions
        if self._stream is not None:
            result, conventions = self._stream.label(result, conventions, settled=is_settled)
        records, scalars = publish(
            self.run_folder,
            result,
            window,
            conventions,
            self.host,
            self.guard,
            with_eigenvalues=self.measurement.settings.eigenvalues,
            with_layers=self.measurement.settings.log_layers,
        )
        if (
            window.stage == "train"
            and self.solver is None
            and (sentence := self._cost.of_window(window.step, result.window_s))
        ):
            self.guard.say("cost", f"step {window.step}: {sentence}")
        if window.stage == "train":
            self._compare_with_counts(records, closed)
        self._tally.lost += bool(records) and all(record.status in LOST for record in records)
        self._react(records)
        return scalars

    def _compare_with_counts(self, records: Sequence[SpectralRecord], closed: ClosedWindow) -> None:
        """Say where a window's tokens are not those that the token counts are of."""
        counted = self.probe.grouping.counted if self._stream is None else self._stream.counted
        rows: dict[tuple[str, str], dict[str, int]] = {}
        for record in records if counted is not None else ():
            rows.setdefault((record.stack, record.module), {})[record.bucket] = record.num_tokens
        if counted is None or not rows:
            return
        stack, module = max(rows, key=lambda place: sum(rows[place].values()))  # an expert sees some of the tokens
        if sentence := unlike_counts(rows[stack, module], *counted, closed.ids.get(stack)):
            self.guard.say("counts", f"step {records[0].step}: {sentence}")

    def _react(self, records: Sequence[SpectralRecord]) -> None:
        name, settings = self.guard.name, self.measurement.settings
        bad = [record for record in records if record.status == "nonfinite"]
        lost = [record for record in records if record.status in LOST]
        if settings.strict and lost:
            raise DeliberateError(f"{name}: step {lost[0].step}: `{lost[0].status}`: {lost[0].reason}")
        for status in dict.fromkeys(record.status for record in lost):
            first = next(record for record in lost if record.status == status)
            share = f"{len(lost)} of {len(records)} spectra"
            self.guard.say(
                status, f"step {first.step}: {share} have status `{status}`: {(first.reason or '').rstrip('.')}."
            )
        if not bad:
            return
        share = f"{len(bad)} of {len(records)} spectra"
        message = (
            f"NaN or Inf activations at step {bad[0].step} in `{bad[0].module}` ({share}; what is beyond "
            "1e19 has no finite square, and counts as such); recorded with status `nonfinite`."
        )
        if settings.on_nonfinite == "raise":
            raise DeliberateError(f"{name}: {message}")
        if settings.on_nonfinite == "warn":
            self.guard.say("nonfinite", message)
