"""Faults drawn from a seed, each put into a job of its own; then the job is started again and must end as undisturbed.

    python -m tests.faults --seed 1 --count 320 --out benchmarks/results/faults_cpu

After every fault: what was recorded before it is still there, the same command goes on, weights and records equal the
undisturbed run's, and no process, hook, thread, lock or partial file is left.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.faults import agents, jobs

LIMIT_S = 90.0  # a job that takes longer hangs: undisturbed, the longest takes 6 s
_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_CHILD_SUBREAPER, _CLONE_NEWNS, _MS_REMOUNT, _MS_REC, _MS_PRIVATE = 36, 0x20000, 32, 0x4000, 1 << 18


@dataclass(frozen=True)
class Size:
    """An undisturbed run of a job."""

    operations: int
    num_bytes: int
    seconds: float


@dataclass
class Fault:
    """One fault, and what came of it.

    Attributes:
        number: In the order of the draw.
        job: See ``jobs.JOBS``.
        kind: See ``_DRAWS``.
        arguments: Of the agent, or of the supervisor.
        ended: Exit code of the disturbed run; negative: the signal that ended it.
        losses: What must hold and does not.
    """

    number: int
    job: str
    kind: str
    arguments: dict[str, Any]
    ended: int | None = None
    losses: list[str] = field(default_factory=list)


# what is drawn


def _at(rng: random.Random, size: Size) -> int:
    return rng.randrange(size.operations)


def _signal_at(rng: random.Random, size: Size) -> dict[str, Any]:
    name = rng.choice(["SIGKILL", "SIGKILL", "SIGTERM", "SIGINT"])
    again = rng.randint(1, 4) if name == "SIGINT" and rng.random() < 0.5 else 0
    return {"at": _at(rng, size), "name": name, "again": again}


def _signal_after(rng: random.Random, size: Size) -> dict[str, Any]:
    name = rng.choice(["SIGKILL", "SIGTERM", "SIGINT", "SIGINT"])
    again_s = rng.uniform(0.005, 0.1) if name == "SIGINT" and rng.random() < 0.5 else None
    return {"name": name, "after_s": round(rng.uniform(0, size.seconds), 3), "again_s": again_s}


_DRAWS: dict[str, Callable[[random.Random, Size], dict[str, Any]]] = {
    "signal at an operation": _signal_at,
    "signal at a time": _signal_after,
    "torn": lambda rng, size: {"at": _at(rng, size), "name": "SIGKILL"},
    "full disk": lambda rng, size: {"num_bytes": rng.randrange(4096, size.num_bytes)},
    "full disk for a while": lambda rng, size: {
        "num_bytes": rng.randrange(4096, size.num_bytes), "freed_after_s": round(rng.uniform(0, size.seconds), 3),
    },
    "file limit": lambda rng, size: {"num_bytes": int(10 ** rng.uniform(1, 5.3))},
    "read-only": lambda rng, size: {
        "at": _at(rng, size), "for_operations": rng.choice([1, 1, 2, 5, 20, 10**9]),
    },
    "clock goes back": lambda rng, size: {"at": _at(rng, size), "seconds": rng.choice([1.0, 3600.0, 86400.0 * 365])},
    "solve fails": lambda rng, size: {"call": rng.randrange(30), "error": rng.choice(["cuda", "memory", "converge"])},
    "NaN": lambda rng, size: {"call": rng.randrange(8)},
    "second run": lambda rng, size: {"after_s": round(rng.uniform(0, size.seconds), 3)},
    "odd rank": lambda rng, size: {
        "how": rng.choice(["dies", "lags", "raises", "none"]), "step": rng.randrange(8),
    },
}  # fmt: skip
_EVERYWHERE = (
    "signal at an operation",
    "signal at a time",
    "torn",
    "full disk",
    "file limit",
    "read-only",
    "clock goes back",
)
_TRAINING = (*_EVERYWHERE, "full disk for a while", "solve fails", "NaN", "second run")
# job -> share of the faults, kinds
PLAN: dict[str, tuple[float, tuple[str, ...]]] = {
    "pretrain": (0.16, _TRAINING),
    "script": (0.34, tuple(kind for kind in _TRAINING if kind != "second run")),
    "memory": (0.27, (*_EVERYWHERE,)),
    "measure": (0.14, (*_EVERYWHERE, "solve fails")),
    "cache": (0.03, ("signal at an operation", "torn", "full disk", "file limit", "read-only", "second run")),
    "sweep": (0.02, ("signal at an operation", "signal at a time", "torn", "full disk", "read-only")),
    "ranks": (0.04, ("odd rank",)),
}  # fmt: skip


def draw(seed: int, count: int, sizes: dict[str, Size]) -> list[Fault]:
    """The faults of a seed: each job has its share, each kind of a job comes round."""
    rng = random.Random(seed)
    found = []
    for job, (share, kinds) in PLAN.items():
        for number in range(max(1, round(share * count))):
            kind = kinds[number % len(kinds)]
            found.append(Fault(0, job, kind, _DRAWS[kind](rng, sizes[job])))
    rng.shuffle(found)
    for number, fault in enumerate(found):
        fault.number = number
    return found


# processes


def adopt_orphans() -> None:
    """A process whose parent has died becomes a child of this one, where it is seen."""
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def children() -> set[int]:
    """Process ids of this process's children."""
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def in_child(work: Callable[[], int], log: Path, report: Path, folder: Path) -> int:
    """Start ``work`` in a forked process with its output in a log; returns its id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(file, stream)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
        warnings.simplefilter("default")
        try:
            code = _code_of(work)
        finally:  # also where a second Ctrl-C meets the end of the work
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            report.write_text(json.dumps(agents.left_behind(folder)))
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _code_of(work: Callable[[], int]) -> int:
    try:
        return work()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except BaseException:  # its traceback would hold on to what it should not
        traceback.print_exc()
        return 99


def wait_for(pid: int, limit_s: float = LIMIT_S) -> int | None:
    """Exit code of a child, or ``None`` if it had to be killed."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def orphans(patience_s: float = 8.0) -> list[int]:
    """Processes that are still there; those that have ended are taken in."""
    deadline = time.monotonic() + patience_s
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        left = sorted(children())
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)


# disks


def own_mounts() -> bool:
    """Mounts made from here on are this process's and its children's; ``False`` where that is not allowed."""
    return _LIBC.unshare(_CLONE_NEWNS) == 0 and _LIBC.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None) == 0


def mount_disk(folder: Path, num_bytes: int, *, again: bool = False) -> bool:
    """A disk of so many bytes at a folder, or the one that is there made larger."""
    flags = _MS_REMOUNT if again else 0
    return _LIBC.mount(b"tmpfs", str(folder).encode(), b"tmpfs", flags, f"size={num_bytes}".encode()) == 0


# one fault


class Supervisor:
    """Puts faults into jobs, one after the other.

    Args:
        work: Folder with the prepared inputs.
        expected: Results of the undisturbed runs, by job.
        has_mounts: Whether disks can be made.
    """

    def __init__(self, work: Path, expected: dict[str, jobs.Facts], has_mounts: bool) -> None:
        self.work, self.expected, self.has_mounts = work, expected, has_mounts

    def run(self, fault: Fault) -> Fault:
        """Disturb, look, start again, look."""
        folder = self.work / f"fault-{fault.number:04d}"
        folder.mkdir()
        try:
            self._disturb(fault, folder)
            self._check(fault, folder)
        except Exception:
            fault.losses.append(f"the harness: {traceback.format_exc(limit=3)}")
        if folder.is_mount():
            _LIBC.umount2(str(folder).encode(), 2)
        if not fault.losses:
            shutil.rmtree(folder, ignore_errors=True)
            for path in self.work.glob(f"fault-{fault.number:04d}.*"):
                path.unlink()
        return fault

    def start(self, fault: Fault, folder: Path, *, disturbed: bool) -> int:
        """The job in a child."""
        job = jobs.JOBS[fault.job]

        def work() -> int:
            if disturbed:
                agents.install(fault.kind, fault.arguments if fault.kind in agents._AGENTS else {}, folder)
            return job.start(folder)

        # a limit on files would hit the log, too
        limited = disturbed and fault.kind == "file limit"
        log = Path(os.devnull) if limited else self.work / f"{folder.name}.log"
        return in_child(work, log, self.work / f"{folder.name}.json", folder)

    def _disturb(self, fault: Fault, folder: Path) -> None:
        given = fault.arguments
        if fault.kind.startswith("full disk") and not (self.has_mounts and mount_disk(folder, given["num_bytes"])):
            fault.kind, fault.arguments = "file limit", {"num_bytes": given["num_bytes"]}
        pid = self.start(fault, folder, disturbed=True)
        second = None
        if fault.kind == "signal at a time":
            _sleep_while_alive(pid, given["after_s"])
            _kill(pid, given["name"])
            if given["again_s"] is not None:
                time.sleep(given["again_s"])
                _kill(pid, given["name"])
        elif fault.kind == "full disk for a while":
            _sleep_while_alive(pid, given["freed_after_s"])
            mount_disk(folder, 1 << 28, again=True)
        elif fault.kind == "second run":
            _sleep_while_alive(pid, given["after_s"])
            second = self.start(fault, folder, disturbed=False)
        fault.ended = wait_for(pid)
        if second is not None and wait_for(second) is None:
            fault.losses.append("the second run hangs")
        if fault.ended is None:
            fault.losses.append(f"hangs for {LIMIT_S:.0f} s")
        if fault.kind == "torn":
            _tear(folder, random.Random(fault.number))
        if fault.kind == "full disk":
            mount_disk(folder, 1 << 28, again=True)

    def _check(self, fault: Fault, folder: Path) -> None:
        job = jobs.JOBS[fault.job]
        before = job.recorded(folder)
        report = self.work / f"{folder.name}.json"
        killed = fault.ended is None or fault.ended < 0
        if not killed:
            fault.losses += [f"left after the fault: {name}" for name in json.loads(report.read_text())]
        fault.losses += [f"orphan process {pid}" for pid in orphans()]
        code = wait_for(self.start(fault, folder, disturbed=False))
        if code != 0:
            fault.losses.append(f"the same command ends with {code}")
            return
        fault.losses += [f"left: {name}" for name in json.loads(report.read_text())]
        fault.losses += [f"orphan process {pid}" for pid in orphans()]
        after = job.recorded(folder)
        gone = [key for key, content in before.items() if after.get(key) != content]
        fault.losses += [f"{len(gone)} records lost or changed, first {gone[0]}"] if gone else []
        fault.losses += _differences(fault, self.expected[fault.job], job.result(folder))
        fault.losses += [f"left: {name}" for name in _stray_files(folder)]


def _differences(fault: Fault, expected: jobs.Facts, found: jobs.Facts) -> list[str]:
    """How a result differs from the undisturbed one; what the fault itself changes is not compared."""
    if fault.kind == "NaN" or fault.arguments.get("how") == "none":  # other weights: what came before is compared above
        return []
    missing = sorted(expected.keys() - found.keys())
    more = sorted(found.keys() - expected.keys())
    changed = sorted(key for key in expected.keys() & found.keys() if expected[key] != found[key])
    if fault.kind == "solve fails":  # windows that could not be solved say so
        changed = [key for key in changed if '"solve_failed"' not in found[key] and not key.endswith(".safetensors")]
        missing = [key for key in missing if not key.endswith(".safetensors")]
    parts = (("not there", missing), ("not expected", more), ("other than undisturbed", changed))
    return [f"{len(keys)} {what}, first {keys[0]}" for what, keys in parts if keys]


def _stray_files(folder: Path) -> list[str]:
    """Locks and parts; the lock files of a token cache stay, they are held by nobody."""
    found = [*folder.rglob("*.partial"), *folder.rglob("*.lock")]
    return [str(path.relative_to(folder)) for path in found if "tokens" not in path.parts]


def _sleep_while_alive(pid: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.005)


def _kill(pid: int, name: str) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.Signals[name])


def _tear(folder: Path, rng: random.Random) -> None:
    """What was written last is cut at some byte, or ends in zeros, as after a failure of the power."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
    if not files:
        return
    last = max(files, key=lambda path: path.stat().st_mtime_ns)
    size = last.stat().st_size
    cut = rng.randrange(size)
    if last.suffix == ".jsonl":  # earlier lines were synced before anything else was written
        cut = max(cut, last.read_bytes()[:-1].rfind(b"\n") + 1)
    os.truncate(last, cut)
    if rng.random() < 0.3 and last.suffix != ".jsonl":
        os.truncate(last, size)


# many


def undisturbed(work: Path, names: list[str]) -> tuple[dict[str, jobs.Facts], dict[str, Size]]:
    """Result and size of each job without a fault."""
    results, sizes = {}, {}
    for name in names:
        folder = work / f"whole-{name}"
        folder.mkdir()
        counted = work / f"{folder.name}.count"

        def counting(name: str = name, folder: Path = folder, counted: Path = counted) -> int:
            operations = agents.Operations(folder)
            code = jobs.JOBS[name].start(folder)
            counted.write_text(json.dumps([operations.count, list(sys.modules)]))
            return code

        began = time.monotonic()
        code = wait_for(in_child(counting, work / f"{folder.name}.log", work / f"{folder.name}.json", folder))
        seconds = time.monotonic() - began
        if code != 0:
            said = (work / f"{folder.name}.log").read_text()[-2000:]
            raise RuntimeError(f"{name} ends with {code} undisturbed: {said}")
        results[name] = jobs.JOBS[name].result(folder)
        num_bytes = sum(path.stat().st_blocks * 512 for path in folder.rglob("*"))
        operations, modules = json.loads(counted.read_text())
        sizes[name] = Size(operations, num_bytes, seconds)
        for module in modules:  # what a job imports late, its children share from now on
            with contextlib.suppress(Exception):
                importlib.import_module(module)
    return results, sizes


def run(
    seed: int,
    count: int,
    work: Path,
    *,
    workers: int = 2,
    only: str = "",
    until: float = math.inf,
    say: Callable[[str], None] = print,
) -> list[Fault]:
    """Draw and run ``count`` faults in ``workers`` processes of this one's; returns them with what came of each."""
    work.mkdir(parents=True, exist_ok=True)
    adopt_orphans()
    has_mounts = own_mounts()
    code = wait_for(in_child(lambda: jobs.prepare(work) or 0, work / "prepare.log", work / "prepare.json", work))
    if code != 0:
        raise RuntimeError(f"cannot prepare: {(work / 'prepare.log').read_text()[-2000:]}")
    expected, sizes = undisturbed(work, list(PLAN))
    gc.collect()
    gc.freeze()  # what has been imported need not be looked through in every child
    faults = [fault for fault in draw(seed, count, sizes) if only in f"{fault.number:04d} {fault.job}: {fault.kind}"]
    supervisors = []
    for worker in range(workers):
        pid = os.fork()
        if pid == 0:
            _supervise(
                Supervisor(work, expected, has_mounts),
                faults[worker::workers],
                work / f"worker-{worker}.jsonl",
                until,
                say,
            )
        supervisors.append(pid)
    for pid in supervisors:
        os.waitpid(pid, 0)
    lines = [line for path in sorted(work.glob("worker-*.jsonl")) for line in path.read_text().splitlines()]
    return sorted((Fault(**json.loads(line)) for line in lines), key=lambda fault: fault.number)


def _supervise(
    supervisor: Supervisor, faults: list[Fault], out: Path, until: float, say: Callable[[str], None]
) -> None:
    try:
        adopt_orphans()
        with out.open("a") as file:
            for fault in faults:
                began = time.monotonic()
                if began > until:
                    break
                supervisor.run(fault)
                file.write(json.dumps(asdict(fault)) + "\n")
                file.flush()
                result = "; ".join(fault.losses) or "nothing lost"
                took = time.monotonic() - began
                what = f"{fault.number:04d} {fault.job}: {fault.kind} {fault.arguments}"
                say(f"{what}: ended {fault.ended}, {took:.1f} s: {result}")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(0)
