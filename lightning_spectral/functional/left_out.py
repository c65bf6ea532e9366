"""What the ranks of a sample without each of its shards in turn say: of endlessly many sequences, and of other ones.

A shard is some whole sequences. Shards may be of any size: where sequences are of unlike length, or fewer than shards,
they are. A *part* is all shards but one, as its rank and its number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.special import stdtrit

from lightning_spectral.functional.rank import possible_rank

Part = tuple[float, int]
_FARTHEST = 700.0  # a logarithm whose exponential is finite


def endless(value: float, num_rows: int, parts: Sequence[Part], width: int, power: float) -> float | None:
    """The rank of infinitely many sequences, in [1, D].

    Along ``S_N ** -power = S ** -power + c / N``; power 0: along ``ln S_N``. Of two shards alike: twice all minus the
    halves.

    Args:
        value: Rank of all rows.
        num_rows: N.
        parts: Each with fewer rows than N.
        width: D.
        power: In [0, 1].

    Returns:
        ``None`` where there is no part, or a rank is not positive.
    """
    logs = _logs(value, parts)
    if logs is None:
        return None
    more = sum(num_rows / rows for _, rows in parts) / len(parts) - 1  # by how much 1 / N grows where a shard is left
    if power < 1e-6:
        return possible_rank(value * math.exp(-sum(logs) / len(logs) / more), width)
    gone = sum(math.expm1(-power * log) for log in logs) / len(logs) / more
    return possible_rank(value * (1.0 - gone) ** (-1.0 / power), width) if gone < 1 else float(width)


def interval(value: float, num_rows: int, parts: Sequence[Part], level: float = 0.95) -> tuple[float, float] | None:
    """Delete-a-shard jackknife t interval of ``ln rank``: a rank is positive and its errors are relative.

    For shards of unlike size as Busing, Meijer and van der Leeden (1999).

    Args:
        value: Rank of all rows.
        num_rows: N.
        parts: Each with fewer rows than N.
        level: Of the interval.

    Returns:
        ``None`` with fewer than two parts, or where a rank is not positive.
    """
    logs = _logs(value, parts)
    if logs is None or len(parts) < 2:
        return None
    shares = [1 - rows / num_rows for _, rows in parts]  # of the shard that is left out
    center = math.fsum((1 - share) * log for share, log in zip(shares, logs, strict=True))
    squares = [(center - (1 / share - 1) * log) ** 2 / (1 / share - 1) for share, log in zip(shares, logs, strict=True)]
    reach = float(stdtrit(len(parts) - 1, (1 + level) / 2)) * math.sqrt(math.fsum(squares) / len(parts))
    return value * math.exp(-reach), value * math.exp(min(reach, _FARTHEST))


def _logs(value: float, parts: Sequence[Part]) -> list[float] | None:
    if not parts or not all(rank > 0 for rank in (value, *(rank for rank, _ in parts))):
        return None
    return [math.log(rank / value) for rank, _ in parts]
