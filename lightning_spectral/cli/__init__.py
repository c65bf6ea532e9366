"""The front door: ``lightning-spectral VERB ...``.

One row per verb; its module is imported only when the verb is called, so that ``fit`` and ``report`` need no torch.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from lightning_spectral import __version__
from lightning_spectral.text import CommandError, did_you_mean, one_line, visible
from lightning_spectral.text.packages import is_installed, source_commit, why_missing

# verb -> (module with a ``main(argv) -> int``, one line of help)
VERBS: dict[str, tuple[str, str]] = {
    "pretrain": ("lightning_spectral.cli.pretrain", "train a recipe and record its ranks"),
    "count-tokens": ("lightning_spectral.cli.count_tokens", "token counts of a text, for TailTokenProbe"),
    "measure": ("lightning_spectral.cli.measure", "ranks of one or two finished models on any text"),
    "inspect": (
        "lightning_spectral.cli.inspect",
        "which layers of a model would be measured, which not, and the memory",
    ),
    "optimizer-table": ("lightning_spectral.cli.optimizer_table", "which optimizer rule gets which weight of a model"),
    "plan": ("lightning_spectral.cli.plan", "what a recipe or sweep takes: tokens, operations, hours, memory, disk"),
    "sweep": ("lightning_spectral.cli.sweep", "many runs from one recipe and axes"),
    "fit": ("lightning_spectral.cli.fit", "scaling exponents of runs or of a table of points"),
    "compare": ("lightning_spectral.cli.compare", "differences of exponents, levels and spectra, with intervals"),
    "power": ("lightning_spectral.cli.power", "how many more widths or seeds separate two slopes"),
    "report": ("lightning_spectral.cli.report", "one offline HTML page of figures and tables"),
    "records": ("lightning_spectral.cli.records", "all records as one table: CSV, JSON or Parquet"),
    "import": ("lightning_spectral.cli.import_runs", "run folders from the paper's logs, TensorBoard or W&B"),
    "completion": ("lightning_spectral.cli.completion", "let your shell complete verbs, options and recipes"),
    "schema": ("lightning_spectral.cli.schema", "JSON Schema of recipes and records, for editors and other readers"),
    "memory": ("lightning_spectral.cli.memory", "the associative memory: what one step stores, predicted and measured"),
}


# what no input of ours can be blamed for
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)
# verbs that show labels and names of files that anybody may have written; the others draw progress bars
_READS_FOREIGN = ("fit", "compare", "power", "report", "records", "import", "inspect", "optimizer-table", "measure")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code: 0 done, 1 failed while running, 2 bad input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    verb, *rest = arguments
    if verb in ("-V", "--version"):
        commit = source_commit()
        print(f"lightning-spectral {__version__}" + (f" (commit {commit[:12]})" if commit else ""))
        return 0
    if verb == "help" and rest[:1] and rest[0] in VERBS:
        verb, rest = rest[0], ["--help"]
    if verb == "lightning-spectral" and rest[:1] and rest[0] in VERBS:
        print(f"lightning-spectral: its name is written once: `lightning-spectral {rest[0]} ...`.", file=sys.stderr)
        return 2
    if verb not in VERBS:
        hint = did_you_mean(
            verb,
            ["--version", "--help"] if verb.startswith("-") or verb == "version" else VERBS,
            otherwise="see --help for",
        )
        print(f"lightning-spectral: unknown verb `{verb}`; {hint}", file=sys.stderr)
        return 2
    return _run(verb, rest)


def _run(verb: str, words: Sequence[str]) -> int:
    """Run a verb; what the command line, the disk or the installation is to blame for is a sentence."""
    try:
        with _visible(verb):
            return int(import_module(VERBS[verb][0]).main(list(words)))
    except CommandError as error:
        return _say(verb, visible(str(error)), 2)
    except BrokenPipeError:  # the reader of a pipe (`| head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        if error.name is None or is_installed(error.name.partition(".")[0]):
            raise  # a module of a package that is there: ours, or another version
        return _say(verb, why_missing(error.name), 2)
    except OSError as error:
        if error.errno not in _OF_THE_DISK and not _was_named(error.filename, words):
            raise
        if isinstance(error, (FileExistsError, NotADirectoryError)) and Path(error.filename or "").is_file():
            option = _option_of(error.filename, words)
            return _say(verb, visible(f"{option}`{error.filename}` is a file, and a folder is wanted there."), 2)
        what = f"`{error.filename}`: " if error.filename else ""
        return _say(verb, f"{visible(what)}{error.strerror}.", 1)


def _say(verb: str, sentence: str, code: int) -> int:
    print(f"lightning-spectral {verb}: {sentence}", file=sys.stderr)
    return code


def _was_named(path: object, words: Sequence[str]) -> bool:
    """Whether a path is, lies below or above what the command line names: then the place is wrong, and not we."""
    if not isinstance(path, (str, os.PathLike)):
        return False
    named = [Path(word.partition("=")[2] if word.startswith("--") else word) for word in words if "/" in word]
    return any(Path(path).is_relative_to(one) or one.is_relative_to(path) for one in named)


def _option_of(path: str, words: Sequence[str]) -> str:
    """The option whose value is this path, or lies below it, as the beginning of a sentence; else nothing."""
    for place, word in enumerate(words):
        option, equals, value = word.partition("=")
        value = value if equals else "".join(words[place + 1 : place + 2])
        if option.startswith("--") and value and Path(value).is_relative_to(path):
            return f"`{option} {value}`: "
    return ""


class _Visible:
    """A text stream that writes control characters out; a progress bar's return to the start of the line stays."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(visible(text, keep="\r"))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _visible(verb: str) -> Iterator[None]:
    """No label of a foreign file moves the cursor or stands for other letters; a warning is one line."""
    if verb not in _READS_FOREIGN:
        yield
        return
    out: Any = _Visible(sys.stdout)
    err: Any = _Visible(sys.stderr)
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"WARNING {one_line(message)}\n"
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield
    finally:
        warnings.formatwarning = before


def _usage() -> str:
    rows = "\n".join(f"  {verb:<17}{help_line}" for verb, (_, help_line) in VERBS.items())
    return (
        "usage: lightning-spectral VERB [options]\n       lightning-spectral --version\n\n"
        f"verbs (each has its own --help):\n{rows}"
    )
