"""How fast is text tokenised and in what memory, and how fast are blocks of tokens handed out?

Each size of text is built in a process of its own, whose peak of memory is its own. The loader reads a memory-mapped
file of tokens in the order that training uses.

    python benchmarks/bench_data.py --megabytes 20 100
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import harness
from lightning_spectral.data.batches import ResumableLoader, StepBatches, TokenBlocks

BUILD = """
import resource, sys, time
from pathlib import Path
from lightning_spectral.data.corpus import Corpus
from lightning_spectral.data.tokens import prepare_tokens
import litgpt.tokenizer, tokenizers
if __name__ == "__main__":
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    began, cpu = time.perf_counter(), time.process_time()
    corpus = Corpus((Path(sys.argv[1]),))
    cache = prepare_tokens(corpus, vocab_size=2048, cache_dir=Path(sys.argv[2]), num_proc=int(sys.argv[3]))
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(len(cache.train) + len(cache.validation), wall, cpu, start, peak)
"""
SHAPES = ((512, 64), (1024, 16), (2048, 8), (4096, 1))


def write_text(path: Path, megabytes: int) -> None:
    """Words of Zipf-like frequency."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlucmfwyp", k=rng.randint(2, 9))) for _ in range(20_000)]
    weights = [1 / (rank + 10) for rank in range(len(words))]
    with path.open("w") as out:
        while out.tell() < megabytes * 1_000_000:
            out.write(" ".join(rng.choices(words, weights, k=20_000)) + "\n")


def build(folder: Path, megabytes: int, num_proc: int) -> dict[str, float]:
    """Tokenise a text of this size in a process of its own."""
    text, script = folder / f"{megabytes}.txt", folder / "build.py"
    write_text(text, megabytes)
    script.write_text(BUILD)
    command = [sys.executable, str(script), str(text), str(folder / f"cache{megabytes}"), str(num_proc)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    tokens, wall, cpu, start, peak = map(float, done.stdout.split())
    return {
        "text MB": megabytes, "M tokens": tokens / 1e6, "wall s": wall, "CPU s": cpu, "MB per CPU s": megabytes / cpu,
        "MiB before": start, "MiB at most": peak,
    }  # fmt: skip


def load(folder: Path, length: int, batch: int) -> float:
    """M tokens per core-second of a loader without workers."""
    path = folder / "tokens.npy"
    if not path.exists():
        np.save(path, np.random.default_rng(0).integers(0, 50_000, 50_000_000, dtype=np.uint16))
    blocks = TokenBlocks(np.load(path, mmap_mode="r"), length)
    num_steps = 10_000_000 // (length * batch)
    order = StepBatches(len(blocks), seed=0, global_batch=batch, micro_batch=batch, num_steps=num_steps)
    began, tokens = time.process_time(), 0
    for batch_BT in ResumableLoader(blocks, order):
        tokens += batch_BT.numel()
    return tokens / 1e6 / (time.process_time() - began)


def main() -> None:
    """Build caches of growing texts, then read blocks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[20, 100], help="sizes of text (default: 20 100)")
    parser.add_argument("--num_proc", type=int, default=1, help="processes that tokenise (default: 1)")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "data_1t_cpu", help="without suffix")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rates = {f"{length} x {batch}": load(Path(folder), length, batch) for length, batch in SHAPES}
        rows = [build(Path(folder), size, options.num_proc) for size in options.megabytes]
    found = {"builds": rows, "loader, M tokens per core-second": rates, "machine": harness.machine()}
    options.out.with_suffix(".json").write_text(json.dumps(found, indent=1, default=str) + "\n")
    lines = ["# Data: from text to blocks", "", f"| {' | '.join(rows[0])} |", "|" + "---:|" * len(rows[0])]
    lines += [f"| {' | '.join(f'{value:,.1f}' for value in row.values())} |" for row in rows]
    lines += ["", *(f"- loader, {shape} tokens, M a core-second: {rate:.1f}" for shape, rate in rates.items()), ""]
    lines += [f"- {name}: {value}" for name, value in harness.machine().items()]
    options.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
