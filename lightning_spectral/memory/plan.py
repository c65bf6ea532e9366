"""The runs of one command: what each will write, what of it is on disk already, how long the rest takes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_spectral.memory.runs import inputs
from lightning_spectral.text import CommandError
from lightning_spectral.theory.problem import MemoryProblem
from lightning_spectral.theory.rules import RuleSettings

Row = dict[str, Any]
_IDENTITY = (
    "kind", "d", "d_out", "n_items", "alpha", "batch_size", "seed", "anisotropy", "dtype", "allow_flat", "rule_label",
    "settings", "mode", "steps", "step_scale", "schedule",
)  # fmt: skip
_SAY_EVERY_S = 30.0


def identity(row: Row) -> str:
    """The inputs that identify a run, as JSON; rows of several steps of a run share them."""
    known = {name: row.get(name) for name in _IDENTITY}
    known["d_out"] = known["d_out"] or known["d"]  # rows of the first versions are of square maps
    return json.dumps(known, sort_keys=True)


@dataclass(frozen=True)
class Task:
    """Rows that are made together.

    Attributes:
        name: For the progress line.
        identities: Of the runs it makes.
        rows: How many rows those are.
        cost: Floating-point operations, roughly.
        make: Makes the rows.
    """

    name: str
    identities: frozenset[str]
    rows: int
    cost: float
    make: Callable[[], Iterator[Row]]


def task_of(
    kind: str,
    problem: MemoryProblem,
    rules: Sequence[str],
    settings: RuleSettings,
    make: Callable[[], Iterator[Row]],
    run: Row | None = None,
) -> Task:
    """One problem with all its rules; ``run`` holds the options of several steps."""
    made = []
    for rule in rules:
        row = {**inputs(kind, problem, rule, settings, {}), **(run or {})}
        if kind == "theory":
            row["steps"] = (run or {})["steps"]
        if row.get("mode") == "deflation":
            row |= {"step_scale": None, "schedule": None}
        made.append(identity(row))
    if len(set(made)) < len(made):
        raise CommandError(f"`--rules` {' '.join(rules)} names one run twice; leave one of them out.")
    steps = int((run or {}).get("steps", 1)) if kind == "steps" else 1
    shape = "x".join(map(str, problem.shape)) if problem.d_out else str(problem.d)
    batch = "" if problem.batch_size is None else f" B={problem.batch_size}"
    name = f"d={shape} alpha={problem.alpha:g}{batch} seed={problem.seed}"
    exact = (run or {}).get("mode") == "exact"
    return Task(name, frozenset(made), len(rules) * steps, _operations(problem, len(rules), steps, exact), make)


def newton_schulz_task(
    problem: MemoryProblem, settings: Sequence[RuleSettings], make: Callable[[], Iterator[Row]]
) -> Task:
    """One problem with every iteration."""
    made = [identity(inputs("newton-schulz", problem, "ns", one, {})) for one in settings]
    name = f"d={problem.d} alpha={problem.alpha:g} seed={problem.seed}"
    return Task(name, frozenset(made), len(made), _operations(problem, len(made) + 1, 1, False), make)


def _operations(problem: MemoryProblem, rules: int, steps: int, exact: bool) -> float:
    outputs, inputs_ = problem.shape
    items = float(problem.n_items)
    gradient = 6 * items**2 * outputs if exact else 2 * items * outputs * inputs_
    polar = 30.0 * min(problem.shape) ** 2 * max(problem.shape)
    recovery = items * outputs * 6000
    return (rules * steps if exact or steps > 1 else 1) * gradient + rules * steps * (polar + recovery)


@dataclass
class Progress:
    """A progress line: the current run and the time left; without a terminal, a new line every half a minute.

    Attributes:
        tasks: All runs to be made.
        write: Where lines go; the standard error stream if it is ``None``.
    """

    tasks: Sequence[Task]
    write: Callable[[str], None] | None = None
    _begun: float = field(default_factory=lambda: time.perf_counter())
    _said: float = -float("inf")
    _done: float = 0.0

    def begin(self, number: int) -> None:
        """Run ``number`` (from 0) begins."""
        now = time.perf_counter()
        terminal = self.write is None and sys.stderr.isatty()
        if not terminal and now - self._said < _SAY_EVERY_S and number:
            return
        self._said = now
        spent, left = now - self._begun, sum(task.cost for task in self.tasks[number:])
        text = f"run {number + 1} of {len(self.tasks)}: {self.tasks[number].name}; {duration(spent)} so far"
        rate = self._done / spent if self._done else _rate()
        text += f", about {duration(left / rate)} to go"
        if self.write is not None:
            self.write(text)
        elif terminal:
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()
        else:
            sys.stderr.write(f"{text}\n")

    def end(self, number: int) -> None:
        """Run ``number`` is over."""
        self._done += self.tasks[number].cost
        if number + 1 == len(self.tasks) and self.write is None and sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def duration(seconds: float) -> str:
    """``40 s``, ``3 min``, ``2.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _rate() -> float:
    """Operations a second of this machine: half of what one fp32 product reaches."""
    import torch

    left, right = torch.ones(512, 512), torch.ones(512, 512)
    left @ right
    begun = time.perf_counter()
    left @ right
    return 0.5 * 2 * 512**3 / max(time.perf_counter() - begun, 1e-6)


def refuse_repeats(options: Any) -> None:
    """A value that a list option names twice would be run twice with the same seeds and counted as two.

    Raises:
        CommandError: Naming option and value.
    """
    for name, values in vars(options).items():
        if isinstance(values, list):
            for value in values:
                if values.count(value) > 1:
                    shown = "population" if value is None else value
                    raise CommandError(
                        f"`--{name.replace('_', '-')}` names {shown} twice: the same runs would count as more seeds; "
                        "leave one out, or raise `--seeds`."
                    )
