"""How fast is text tokenised and in what memory, and how fast are blocks of tokens handed out?

Each size of text is built in a process of its own, whose peak of memory is its own. The loader reads a memory-mapped
file of tokens in the order that training uses.

    python benchmarks/bench_data.py --megabytes 100 1000
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
from lightning_spectral.data.corpus import state_of_the_union_files

BUILD = """
import json, resource, sys, time
from pathlib import Path
from lightning_spectral.data.corpus import Corpus
from lightning_spectral.data.tokens import prepare_tokens
import litgpt.tokenizer, tokenizers

def usage(who):
    found = resource.getrusage(who)
    return found.ru_utime + found.ru_stime, found.ru_maxrss / 1024

if __name__ == "__main__":
    began, (cpu, start) = time.perf_counter(), usage(resource.RUSAGE_SELF)
    corpus = Corpus((Path(sys.argv[1]),))
    cache = prepare_tokens(corpus, vocab_size=2048, cache_dir=Path(sys.argv[2]), num_proc=int(sys.argv[3]))
    wall, (own_cpu, peak) = time.perf_counter() - began, usage(resource.RUSAGE_SELF)
    workers_cpu, worker_peak = usage(resource.RUSAGE_CHILDREN)
    print(json.dumps({
        "M tokens": (len(cache.train) + len(cache.validation)) / 1e6, "wall s": wall,
        "CPU s": own_cpu - cpu + workers_cpu, "MiB before": start, "MiB at most": peak,
        "MiB at most, a worker": worker_peak,
    }))
"""
SHAPES = ((512, 64), (1024, 16), (2048, 8), (4096, 1))


def write_text(path: Path, megabytes: int) -> None:
    """The State of the Union addresses again and again: paragraphs shuffled, one word in ten another one."""
    rng = random.Random(0)
    text = "\n".join(file.read_text(errors="replace") for file in state_of_the_union_files())
    paragraphs = [paragraph.split(" ") for paragraph in text.splitlines() if paragraph]
    words = [word for paragraph in paragraphs for word in paragraph]
    written = 0
    with path.open("w") as out:
        while written < megabytes * 1_000_000:
            copy = list(rng.choice(paragraphs))
            for place in range(rng.randrange(10), len(copy), 10):
                copy[place] = words[int(rng.random() * len(words))]
            written += out.write(" ".join(copy) + "\n")


def build(folder: Path, megabytes: int, num_proc: int) -> dict[str, float]:
    """Tokenise a text of this size in a process of its own."""
    text, script = folder / f"{megabytes}.txt", folder / "build.py"
    if not text.exists():
        write_text(text, megabytes)
    script.write_text(BUILD)
    command = [sys.executable, str(script), str(text), str(folder / f"cache{megabytes}-{num_proc}"), str(num_proc)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    found = json.loads(done.stdout)
    rates = {"M tokens per CPU s": found["M tokens"] / found["CPU s"], "MB per wall s": megabytes / found["wall s"]}
    return {"text MB": megabytes, "processes": num_proc, **found, **rates}


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
    parser.add_argument("--megabytes", type=int, nargs="+", default=[100, 1000], help="sizes of text")
    parser.add_argument("--num_proc", type=int, nargs="+", default=[1, 2], help="processes that tokenise")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "data_cpu", help="without suffix")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rates = {f"{length} x {batch}": load(Path(folder), length, batch) for length, batch in SHAPES}
        rows = [build(Path(folder), size, num_proc) for size in options.megabytes for num_proc in options.num_proc]
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
