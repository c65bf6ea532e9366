"""``lightning-spectral count-tokens --data PATH --out counts.npy``: how often each token occurs in a text."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_spectral.cli.parser import VerbParser, data_files
from lightning_spectral.text import CommandError, whole_file


def main(argv: list[str]) -> int:
    """Run the verb; 0 done, 2 bad input."""
    parser = VerbParser(
        "count-tokens",
        description="Count each token id in the training part of a text (every 18th block is held out, as in pretrain)"
        " and write one int64 an id: the file that `TailTokenProbe(counts=...)` reads.",
    )
    parser.add_argument(
        "--data", required=True, help="a .txt, .jsonl or .parquet file, a glob, a folder, or StateOfTheUnion"
    )
    parser.add_argument("--out", required=True, type=Path, help="the .npy file to write")
    parser.add_argument("--tokenizer_dir", type=Path, help="tokenizer to use (default: train a byte-level BPE)")
    parser.add_argument("--vocab_size", type=int, default=2048, help="ids of the trained BPE (default: 2048)")
    parser.add_argument("--text_column", default="text", help="column or key of the text (default: text)")
    parser.add_argument("--cache_dir", type=Path, help="where tokenizer and tokens are kept")
    parser.add_argument("--num_proc", type=int, default=1, help="processes that tokenise (default: 1)")
    arguments = parser.parse_args(argv)
    with parser.own_words():
        return _count(arguments)


def _count(arguments: argparse.Namespace) -> int:
    """Count and write."""
    if arguments.out.suffix != ".npy":
        raise CommandError(f"`--out` must end in .npy, got `{arguments.out}`.")
    import numpy as np

    from lightning_spectral.data.corpus import Corpus, state_of_the_union_files
    from lightning_spectral.data.files import FoundFiles
    from lightning_spectral.data.tokens import prepare_tokens

    try:
        own = arguments.data == "StateOfTheUnion"
        files = FoundFiles(state_of_the_union_files()) if own else data_files(arguments.data)
        cache = prepare_tokens(
            Corpus.of(files, arguments.text_column),
            vocab_size=arguments.vocab_size,
            tokenizer_dir=arguments.tokenizer_dir,
            cache_dir=arguments.cache_dir,
            report=lambda line: print(line, flush=True),
            num_proc=arguments.num_proc,
        )
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        raise CommandError(str(error)) from error
    with whole_file(arguments.out) as partial, partial.open("wb") as file:
        np.save(file, cache.counts)
    counts = cache.counts
    print(cache)
    print(f"{arguments.out}: {len(counts):,} ids, {int((counts > 0).sum()):,} seen, {int(counts.sum()):,} tokens")
    return 0
