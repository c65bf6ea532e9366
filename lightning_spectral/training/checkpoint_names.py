"""Which step a checkpoint is of, by what lies beside it and by its name; never guessed.

``step1000``, ``step-00000008``, ``epoch=0-step=100.ckpt``, ``checkpoint-500``, ``global_step12``, ``iteration-100`` and
``stage1-step10000-tokens42B`` are names that people use, as is ``1000`` in a folder ``steps``; a Hugging Face Trainer
leaves ``trainer_state.json``. A number alone may be a width, a seed or a version, and ``revision-2`` is one.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from lightning_spectral.text import parse_json

_NOT_WHOLE = r"(?![a-z\d]|\.\d|[_,]\d{3}(?!\d))"  # 1.2.3 is a version, 1_000 may be a step or two numbers
_STEP = re.compile(
    r"(?:^|[^a-z])(?:global[-_]?)?(?:steps?|iter(?:ation)?s?|checkpoint|ckpt|updates?)[-_=]?(\d+(?:\.\d+)?)([km]?)"
    + _NOT_WHOLE,
    re.I,
)
_COUNTS_STEPS = re.compile(r"(?:global[-_]?)?(?:steps?|iter(?:ation)?s?|updates?)", re.I)  # of a folder of numbers
_TOKENS = re.compile(r"(?:^|[^a-z])tokens?[-_=]?(\d+(?:\.\d+)?)([kmbt]?)(?![a-z\d])", re.I)
_SCALE = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_WEIGHTS = ("lit_model.pth", "*.safetensors", "*.ckpt")


@dataclass(frozen=True)
class Progress:
    """How far a checkpoint's training was; ``None`` where nothing says."""

    step: int | None = None
    tokens: int | None = None


def progress_of(checkpoint: Path) -> Progress:
    """Step and tokens by ``trainer_state.json``, else by the name of the file or folder."""
    found = _progress_of_name(_telling_name(checkpoint))
    try:
        state = parse_json((checkpoint / "trainer_state.json").read_text())
        step, tokens = state.get("global_step"), state.get("num_input_tokens_seen")
    except (OSError, ValueError, AttributeError):
        return found
    step = step if isinstance(step, int) else found.step
    return Progress(step, tokens if isinstance(tokens, int) and tokens > 0 else found.tokens)


def _telling_name(checkpoint: Path) -> str:
    """Its name; behind that of the folder where this says what a bare number counts, as in ``steps/1000``."""
    parent = checkpoint.absolute().parent.name
    bare = checkpoint.name.isdecimal() and _COUNTS_STEPS.fullmatch(parent)
    return f"{parent}-{checkpoint.name}" if bare else checkpoint.name


def _progress_of_name(name: str) -> Progress:
    step, tokens = _STEP.findall(name), _TOKENS.findall(name)
    return Progress(_number(*step[-1]) if step else None, _number(*tokens[-1]) if tokens else None)


def _number(digits: str, unit: str) -> int | None:
    """``1.5`` and ``k`` are 1,500; 1.5 alone is no count of anything."""
    value = Decimal(digits) * _SCALE[unit.lower()]
    return int(value) if value == int(value) else None


def find_checkpoints(patterns: Sequence[str]) -> list[Path]:
    """Checkpoints behind paths, globs and folders of checkpoints; each model's by step.

    Raises:
        FileNotFoundError: If one of them leads to none.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        text = str(Path(pattern).expanduser())
        paths = [Path(text)] if Path(text).exists() else sorted(map(Path, glob.glob(text, recursive=True)))
        inside = [checkpoint for path in paths for checkpoint in _checkpoints_in(path)]
        if not inside:
            raise FileNotFoundError(
                f"no checkpoint at `{pattern}`{_hub_hint(str(pattern))}: give a litgpt folder (`lit_model.pth`), a "
                "`.ckpt` of `pretrain`, a Hugging Face folder (`config.json`, `*.safetensors`), a glob of them, or a "
                "folder that holds them."
            )
        found |= dict.fromkeys(_in_order(inside))
    return list(found)


def _hub_hint(pattern: str) -> str:
    """What to do with an id of the Hugging Face Hub; empty for what cannot be one."""
    repository, _, revision = pattern.partition("@")
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*/[A-Za-z0-9][\w.-]*", repository) or Path(repository).parent.is_dir():
        return ""
    chosen = f" --revision {revision}" if revision else ""
    folder = repository.partition("/")[2]
    download = f"hf download {repository}{chosen} --local-dir {folder}"
    return f" (nothing is downloaded here: `{download}`, then `measure {folder}`)"


def _checkpoints_in(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix == ".ckpt" or path.name == "lit_model.pth" else []
    if _is_checkpoint(path):
        return [path]
    inside = [file if file.suffix == ".ckpt" else file.parent for name in _WEIGHTS for file in path.rglob(name)]
    return [one for one in dict.fromkeys(inside) if one.is_file() or _is_checkpoint(one)]


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "lit_model.pth").is_file() or (folder / "config.json").is_file()


def _in_order(checkpoints: Iterable[Path]) -> list[Path]:
    return sorted(checkpoints, key=lambda path: (str(path.parent), progress_of(path).step or 0, path.name))


def folders_of(checkpoints: Sequence[Path], out: Path) -> dict[Path, list[Path]]:
    """The run folder that each checkpoint's records go to.

    Checkpoints of one parent folder whose steps are known and differ are one model at several steps: one run folder,
    named as the parent. Every other checkpoint has a run folder of its own.
    """
    by_parent = _by_parent(checkpoints)
    names = _short_names(list(by_parent))
    folders: dict[Path, list[Path]] = {}
    for parent, members in by_parent.items():
        steps = [progress_of(member).step for member in members]
        if _is_curve(steps):
            folders[out / names[parent]] = members
        else:
            folders |= {out / names[parent] / _stem(member): [member] for member in members}
    return folders


def why_no_curve(checkpoints: Sequence[Path]) -> list[str]:
    """A sentence for every folder whose checkpoints look like steps of one model and are not joined."""
    said = []
    for parent, members in _by_parent(checkpoints).items():
        steps = [progress_of(member).step for member in members]
        unknown = [member.name for member, step in zip(members, steps, strict=True) if step is None]
        alike = len({re.sub(r"\d+", "", member.name) for member in members}) == 1
        if len(members) < 2 or _is_curve(steps) or (len(unknown) == len(members) and not alike):
            continue
        one = unknown[0] if unknown else members[0].name
        why = f"the name `{one}` says no step" if unknown else "two of them are of the same step"
        link = f"link it under a name with its step (`ln -s {one} step-1000`)" if unknown else "give each a folder"
        said.append(
            f"the {len(members)} checkpoints in `{parent}` are no curve over steps, each is a run of its own: {why}. "
            f"If they are steps of one model, {link}, or choose by a glob."
        )
    return said


def _by_parent(checkpoints: Iterable[Path]) -> dict[Path, list[Path]]:
    by_parent: dict[Path, list[Path]] = {}
    for checkpoint in checkpoints:
        by_parent.setdefault(checkpoint.absolute().parent, []).append(checkpoint)
    return by_parent


def _is_curve(steps: Sequence[int | None]) -> bool:
    """Whether checkpoints of one folder are one model at several steps."""
    return len(steps) > 1 and None not in steps and len(set(steps)) == len(steps)


def _short_names(parents: Sequence[Path]) -> dict[Path, Path]:
    """Each folder without what all of them begin with, but never empty."""
    split = [parent.parts for parent in parents]
    shared = 0
    while all(len(parts) > shared + 1 for parts in split) and len({parts[shared] for parts in split}) == 1:
        shared += 1
    return {parent: Path(*parent.parts[shared:]) for parent in parents}


def _stem(checkpoint: Path) -> str:
    return checkpoint.stem if checkpoint.is_file() else checkpoint.name
