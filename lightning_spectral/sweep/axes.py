"""What varies in a sweep: axes and grids, as a recipe, a command line or a smoke run names them.

A recipe says in a ``sweep:`` block what varies::

    sweep:
      axes:
        optimizer:                                  # a name of one's own: label -> overrides of recipe keys
          AdamW: {optimizer.init_args.lr: 3e-3}
          Muon: {optimizer.class_path: lightning_spectral.optim.Muon, optimizer.init_args.lr: 0.02}
        architecture.ffn_multiplier: [1, 2, 4]      # or any recipe key: values
        seed: [0, 1, 2]
      also:                                         # further grids, added to the first
        - optimizer: {AdamW lr x3: {optimizer.init_args.lr: 1e-2}}
          architecture.ffn_multiplier: [1, 4]
          seed: [0]
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from lightning_spectral.text import did_you_mean
from lightning_spectral.training import document
from lightning_spectral.training.document import RecipeError
from lightning_spectral.training.names import refuse_unknown_names, with_class_paths
from lightning_spectral.training.values import refuse_wrong_values


@dataclass(frozen=True)
class Axis:
    """One thing that varies: (label, overrides) for each of its values."""

    name: str
    values: tuple[tuple[str, dict[str, Any]], ...]


def read(
    source: str | Path, *, axes: Sequence[str] = (), overrides: Sequence[str] = (), smoke: bool = False
) -> tuple[Path, dict[str, Any], dict[str, Any], list[list[Axis]]]:
    """File, tree, common overrides and grids of a sweep, every name in them checked; imports neither torch nor litgpt.

    Args:
        source: As for :func:`lightning_spectral.sweep.plan.plan`.
        axes: As for :func:`lightning_spectral.sweep.plan.plan`.
        overrides: As for :func:`lightning_spectral.sweep.plan.plan`.
        smoke: As for :func:`lightning_spectral.sweep.plan.plan`.

    Raises:
        RecipeError: If the recipe or an axis cannot be read, or a name is not known.
    """
    file = document.find(source)
    given = [parse_axis(text) for text in axes]
    common = dict(document.parse_words(overrides))
    tree = document.read_tree(file)
    grids = read_grids(tree, file)
    if smoke:
        settings, grids = smoke_form(tree, file, grids)
        common = {**settings, **common}
    names = [axis.name for axis in given]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RecipeError(f"--axis `{twice}` is given twice: write all its values in one, `{twice}=a,b,c`.")
    if given:
        grids = [_with_axes(grids[0] if grids else [], given)]
    if not grids:
        raise RecipeError(f"`{file}` has no `sweep:` block and no --axis was given: nothing varies.")
    for own in ({}, *_checked_together(grids)):
        named = with_class_paths(document.overridden(tree, {**common, **own}))
        refuse_unknown_names(named)
        refuse_wrong_values(named)
    return file, tree, common, grids


def _checked_together(grids: list[list[Axis]]) -> Iterator[dict[str, Any]]:
    """Overrides of runs: all of a small grid, else every value beside the first one of the other axes."""
    for grid in grids:
        firsts = [axis.values[0][1] for axis in grid]
        if prod(len(axis.values) for axis in grid) <= 32:
            yield from (_merged(run) for run in product(*([own for _, own in axis.values] for axis in grid)))
            continue
        for place, axis in enumerate(grid):
            yield from (_merged([*firsts[:place], own, *firsts[place + 1 :]]) for _, own in axis.values)


def _merged(overrides: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return {key: value for own in overrides for key, value in own.items()}


def read_grids(tree: Mapping[str, Any], file: Path) -> list[list[Axis]]:
    """Grids of a recipe's ``sweep:`` block: ``axes`` first, then each of ``also``.

    Raises:
        RecipeError: If the block is not understood.
    """
    block = tree.get("sweep")
    if block is None:
        return []
    other = [str(name) for name in block if name not in ("axes", "also")] if isinstance(block, dict) else []
    if other or not isinstance(block, dict):
        what = f"the key `{other[0]}`" if other else repr(block)
        near = did_you_mean(other[0], ("axes", "also"), otherwise="") if other else ""
        near = near if near.endswith("?") else f"write `axes: {{{other[0] if other else 'seed'}: [a, b]}}`."
        raise RecipeError(
            f"`sweep:` in `{file}` has {what}; it knows `axes` (a mapping) and `also` (a list of such): {near}"
        )
    grids = [block.get("axes") or {}, *(block.get("also") or [])]
    return [[_axis(str(name), values) for name, values in grid.items()] for grid in grids if grid]


def smoke_form(tree: Mapping[str, Any], file: Path, grids: list[list[Axis]]) -> tuple[dict[str, Any], list[list[Axis]]]:
    """What the ``smoke:`` block sets for every run, and the first grid with the values that it keeps.

    Raises:
        RecipeError: If there is no such block, or it names an axis or a label that the sweep does not have.
    """
    block = tree.get("smoke")
    if not isinstance(block, dict) or not set(block) <= {"set", "axes"}:
        raise RecipeError(f"`{file}` has no `smoke:` block with `set` (keys and values) and `axes` (labels to keep).")
    kept, first = block.get("axes") or {}, grids[0] if grids else []
    for name, labels in kept.items():  # a list, or a mapping label -> what is laid over the axis's own overrides
        axis = next((axis for axis in first if axis.name == name), None)
        known = [label for label, _ in axis.values] if axis else []
        missing = [str(label) for label in labels if str(label) not in known]
        if missing:
            there = ", ".join(known) or "no values"
            raise RecipeError(f"`smoke.axes.{name}` keeps `{missing[0]}`; the axis has {there}.")
    return dict(block.get("set") or {}), [[_kept(axis, kept.get(axis.name)) for axis in first]]


def _kept(axis: Axis, labels: Any) -> Axis:
    """The values of an axis that a smoke run keeps: all without a choice."""
    if labels is None:
        return axis
    over = {str(label): own or {} for label, own in labels.items()} if isinstance(labels, dict) else {}
    chosen = [pair for pair in axis.values if pair[0] in map(str, labels)]
    return Axis(axis.name, tuple((label, {**own, **over.get(label, {})}) for label, own in chosen))


def parse_axis(text: str) -> Axis:
    """``seed=0,1,2`` as an axis.

    Raises:
        RecipeError: If it is not ``key=a,b,c``.
    """
    name, equals, values = (part.strip() for part in text.partition("="))
    if values.startswith("[") and values.endswith("]"):
        raise RecipeError(f"--axis `{text}`: write the values without brackets, `{name}={values[1:-1]}`.")
    if not equals or not name or not values:
        raise RecipeError(f"--axis `{text}`: write `key=a,b,c`, e.g. `seed=0,1,2`.")
    return _axis(name, [document.read_value(value) for value in values.split(",")])


def _axis(name: str, values: Any) -> Axis:
    if isinstance(values, dict):
        if not all(isinstance(own, dict) for own in values.values()):
            raise RecipeError(f"axis `{name}`: each label needs a mapping of recipe keys to values.")
        return Axis(name, tuple((str(label), {str(k): v for k, v in own.items()}) for label, own in values.items()))
    if not isinstance(values, list) or not values:
        raise RecipeError(f"axis `{name}` is {values!r}: give a list of values, or a mapping label -> overrides.")
    return Axis(name, tuple((str(value), {name: value}) for value in values))


def _with_axes(grid: list[Axis], given: list[Axis]) -> list[Axis]:
    """Axes of a grid with those given on the command line in place of, or after, its own.

    A named axis of the recipe keeps the overrides of the labels that are chosen.
    """
    own = {axis.name: axis for axis in grid}
    for axis in given:
        old = own.get(axis.name)
        known = dict(old.values) if old is not None else {}
        if old is not None and any(set(overrides) != {axis.name} for overrides in known.values()):
            missing = [label for label, _ in axis.values if label not in known]
            if missing:
                raise RecipeError(f"axis `{axis.name}` has no `{missing[0]}`; it has {', '.join(known)}.")
            own[axis.name] = Axis(axis.name, tuple((label, known[label]) for label, _ in axis.values))
        else:
            own[axis.name] = axis
    return list(own.values())


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def distinct(grids: list[list[Axis]]) -> Iterator[dict[str, Any]]:
    """Overrides of a run for each value that is a name or has a label, and for one number of each key.

    Checking a recipe in full takes most of a second, too long to do it for each of a hundred runs.
    """
    seen: list[Any] = []
    for grid in grids:
        firsts = [axis.values[0][1] for axis in grid]
        for place, axis in enumerate(grid):
            for _, overrides in axis.values:
                key = axis.name if set(overrides) == {axis.name} and _is_number(overrides[axis.name]) else overrides
                if key not in seen:
                    seen.append(key)
                    yield _merged([*firsts[:place], overrides, *firsts[place + 1 :]])
