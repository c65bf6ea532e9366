"""``python -m tests.faults``: see :mod:`tests.faults.harness`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: a process with more threads must not be forked
for _variable in ("HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"):
    os.environ.setdefault(_variable, "1" if _variable == "HF_HUB_OFFLINE" else "false")


def main(argv: list[str]) -> int:
    """0: nothing was lost."""
    parser = argparse.ArgumentParser("python -m tests.faults", description="Faults drawn from a seed; what is lost?")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=320)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no fault after so many")
    parser.add_argument("--only", default="", help="faults whose number, job and kind hold these words")
    parser.add_argument("--work", type=Path, help="keep the folders of what was lost here")
    parser.add_argument("--out", type=Path, help="write the result to OUT.json and OUT.md")
    options = parser.parse_args(argv)
    from tests.faults import harness

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        given = {"workers": options.workers, "only": options.only, "until": began + 60 * options.minutes}
        faults = harness.run(options.seed, options.count, work, **given)
    lost = [fault for fault in faults if fault.losses]
    minutes = (time.monotonic() - began) / 60
    print(f"{len(faults)} faults of seed {options.seed}, {len(lost)} losses, {minutes:.1f} minutes")
    if options.out:
        write(options.out, options.seed, faults, minutes)
    return 1 if lost or not faults else 0


def write(out: Path, seed: int, faults: list, minutes: float) -> None:  # type: ignore[type-arg]
    """The result as JSON and as a table."""
    from lightning_spectral.probe.run_folder import package_versions
    from lightning_spectral.text import write_text

    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    about = {"seed": seed, "minutes": round(minutes, 1), "machine": machine, "versions": package_versions()}
    content = {**about, "faults": [vars(fault) for fault in faults]}
    write_text(out.with_suffix(".json"), json.dumps(content, indent=0) + "\n")
    counts = Counter((fault.job, fault.kind) for fault in faults)
    lost = Counter((fault.job, fault.kind) for fault in faults if fault.losses)
    jobs = sorted({job for job, _ in counts})
    rows = []
    for kind in sorted({kind for _, kind in counts}):
        cells = [f"{counts[job, kind] or ''}{f' ({lost[job, kind]} lost)' * bool(lost[job, kind])}" for job in jobs]
        rows.append(f"| {kind} | {' | '.join(cells)} |")
    text = [
        f"{len(faults)} faults of seed {seed}, {sum(lost.values())} losses; {minutes:.1f} minutes on {machine}.",
        "",
        f"    python -m tests.faults --seed {seed} --count {len(faults)}",
        "",
        "After each: what was recorded before is there, the same command goes on, weights and records equal the",
        "undisturbed run's, and no process, hook, thread, lock or partial file is left.",
        "",
        f"| | {' | '.join(jobs)} |",
        "|---" * (len(jobs) + 1) + "|",
        *rows,
    ]
    write_text(out.with_suffix(".md"), "\n".join(text) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
