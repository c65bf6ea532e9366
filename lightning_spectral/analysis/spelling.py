"""How people spell numbers and columns: thousands, decimal commas, percent, signs of typography, units behind a name.

Whether ``1,024`` is a thousand or about one cannot be seen in a cell, but often in its table. Where nothing
in the table decides, such cells stay as they are, which is no number: better a sentence than a value a thousand times
too large.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Final

_UNIT: Final = re.compile(r"\s*[(\[][^()\[\]]*[)\]]\s*$")
_SPACES: Final = " \u00a0\u2009\u202f'\u2019"  # between groups of three digits
_MINUS: Final = str.maketrans(dict.fromkeys("\u2212\u2013\ufe63\uff0d", "-"))
_SPACED: Final = re.compile(rf"[-+]?\d{{1,3}}(?:[{_SPACES}]\d{{3}})+(?:[.,]\d+)?")
_NUMBER: Final = re.compile(r"([-+]?)([\d.,]*\d)((?:[eE][-+]?\d+)?)")
_MULTIPLES: Final = {"k": 3, "K": 3, "m": 6, "M": 6, "b": 9, "B": 9, "t": 12, "T": 12}
_MULTIPLE: Final = re.compile(r"([-+]?\d+(?:\.\d+)?)\s?([kKmMbBtT])")


def bare(name: str) -> str:
    """``Width (D)`` and ``FFN hidden dim`` as ``width`` and ``ffn_hidden_dim``."""
    return re.sub(r"[\s-]+", "_", _UNIT.sub("", name).strip().lower())


def as_known(names: Sequence[str], known: Collection[str]) -> list[str]:
    """Names of columns; one that is a known one but for capitals, blanks or a unit becomes it, if no other is."""
    found = Counter(bare(name) for name in names)
    free = set(known) - set(names)
    return [bare(name) if bare(name) in free and found[bare(name)] == 1 else name for name in names]


def column_of(name: str, names: Collection[str]) -> str:
    """The column that somebody means: of that name, or the only one that is it but for capitals, blanks or a unit."""
    alike = [other for other in names if bare(other) == bare(name)]
    return alike[0] if name not in names and len(alike) == 1 else name


def as_python_writes(cells: Collection[str]) -> dict[str, str]:
    """Cells of one table that are spelled in another way than Python reads -> the same as Python reads it.

    Args:
        cells: Every cell of the table, each once.
    """
    odd = {cell: _tidied(cell) for cell in cells if not _is_plain(cell)}
    if any("," in cell for cell in odd.values()):
        tidied = {cell: odd.get(cell, cell) for cell in cells}
        shown = {_decimal_sign(cell) for cell in tidied.values()} - {""}
        if len(shown) == 1:
            (sign,) = shown
            odd = {cell: _with_point(own, sign) for cell, own in tidied.items()}
    return {cell: new for cell, own in odd.items() if (new := _without_percent(own)) != cell}


def _is_plain(cell: str) -> bool:
    """Whether Python reads the cell as a number, as nearly all of long tables."""
    try:
        float(cell)
    except ValueError:
        return False
    return not (cell[0].isspace() or cell[-1].isspace())


def multiple(cell: str) -> float | None:
    """``70M``, ``1.4b`` and ``300 B`` as numbers; ``None`` for anything else."""
    found = _MULTIPLE.fullmatch(cell.strip())
    return float(f"{found[1]}e{_MULTIPLES[found[2]]}") if found else None


def _tidied(cell: str) -> str:
    """Without blanks around it, and of a number without those between thousands and with a plain minus."""
    cell = cell.strip()
    signed = cell.translate(_MINUS)
    if _SPACED.fullmatch(signed):
        signed = re.sub(f"[{_SPACES}]", "", signed)
    return signed if _NUMBER.fullmatch(signed.removesuffix("%").rstrip()) else cell


def _decimal_sign(cell: str) -> str:
    """The sign that must begin the decimals if the cell is a number; empty if it shows neither."""
    found = _NUMBER.fullmatch(cell.removesuffix("%").rstrip())
    signs = [sign for sign in found[2] if sign in ".,"] if found else []
    if found is None or not signs:
        return ""
    whole, *groups = re.split("[.,]", found[2])
    grouped = 1 <= len(whole) <= 3 and not whole.startswith("0") and not found[3]
    if len(signs) == 1:
        return "" if grouped and len(groups[0]) == 3 else signs[0]
    if not grouped or any(len(group) != 3 for group in groups[:-1]) or len(set(signs[:-1])) > 1:
        return ""  # a list or a version
    if signs[-1] != signs[0]:
        return signs[-1]
    return {".": ",", ",": "."}[signs[0]] if len(groups[-1]) == 3 else ""


def _with_point(cell: str, sign: str) -> str:
    other = "," if sign == "." else "."
    number = rf"[-+]?(?:\d{{1,3}}(?:[{other}]\d{{3}})+|\d*)(?:[{sign}]\d+)?(?:[eE][-+]?\d+)?\s?%?"
    return cell.replace(other, "").replace(sign, ".") if re.fullmatch(number, cell) else cell


def _without_percent(cell: str) -> str:
    found = re.fullmatch(r"([-+]?\d*\.?\d+)\s?%", cell)
    return f"{found[1]}e-2" if found else cell
