"""What an observer needs to know about the loop that it watches, in plain values: every shell makes one of these."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lightning_spectral.probe.guard import warn
from lightning_spectral.probe.results import WindowResult
from lightning_spectral.probe.run_folder import RunFolder
from lightning_spectral.records import SpectralRecord

Scalars = dict[str, float]
_logger = logging.getLogger("lightning_spectral")


@dataclass
class Host:
    """One loop, as its shell sees it.

    Attributes:
        folder: Where records are wanted (this rank's opinion; rank 0's counts).
        run_id: Of a run that starts; this rank's opinion.
        describe: Fields of ``RunInfo`` beyond the measurement's own: optimizer, seed, hparams.
        resume: Go on with what is in the folder: ``True``, or the id of the run that is continued.
        makes_room: Whether an earlier run in the folder is moved aside; ``False`` for an evaluation.
        opened: Run folders that others of this loop have opened.
        opens_late: Open the folder with the first window instead of at the start.
        writes: Whether this process writes files (rank 0, and no dry run).
        is_first: Whether this is rank 0.
        num_replicas: Ranks with different data.
        process_group: These ranks; ``None`` for the world.
        is_stage: Whether ranks of other process groups hold other layers: a pipeline stage.
        may_solve_beside: Whether training windows may be solved in a thread, as far as the loop is concerned.
        num_local_processes: Processes of this loop on this machine.
        log: Sends scalars to the loop's loggers.
        published: Called with the records and the result of every published window.
        tell: Warns the user; silent on every rank but the first.
        inform: Logs one line.
    """

    folder: str | Path
    run_id: str
    describe: dict[str, Any] = field(default_factory=dict)
    resume: bool | str = False
    makes_room: bool = True
    opened: Callable[[], Sequence[RunFolder]] = tuple
    opens_late: bool = False
    writes: bool = True
    is_first: bool = True
    num_replicas: int = 1
    process_group: dist.ProcessGroup | None = None
    is_stage: bool = False
    may_solve_beside: bool = True
    num_local_processes: int = 1
    log: Callable[[Scalars, int | None], None] = lambda scalars, step: None
    published: Callable[[Sequence[SpectralRecord], WindowResult], None] = lambda records, result: None
    tell: Callable[[str], None] = warn
    inform: Callable[[str], None] = _logger.info

    def __post_init__(self) -> None:
        if not self.is_first:
            self.tell = _silent

    @property
    def group_ranks(self) -> list[int] | None:
        """Global ranks that rows are added over, where they are not the world."""
        return dist.get_process_group_ranks(self.process_group) if self.is_stage else None


def _silent(message: str) -> None:
    """Rank 0 says it."""
