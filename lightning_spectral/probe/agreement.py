"""Ranks agree before anything moves: a bounded exchange through the store that the process group was made from.

A collective cannot be given up: where one rank does not come, the others wait for the process group's timeout (half an
hour by default) and a collective of the training may be answered by one of ours. So each rank first writes what it has
to say under a key. The first rank collects, and one write (compare and set, so that it happens once) decides for all:
what everyone said, or that somebody was missing. A rank that is late finds the decision and follows it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

LIMIT_S = 20.0  # of one wait; several callbacks on one rank alone must not wait this long each
_AFTER_ONE_MISSED_S = 3.0
_GRACE_S = 3.0  # so much longer the others wait for the first rank's decision
_MISSED = "lightning_spectral/missed"  # a key that is set once a rank did not come
_used: Counter[str] = Counter()


class MissingRankError(RuntimeError):
    """Not every rank came to an exchange in time; raised on every rank that did."""


class Agreement:
    """Exchanges among all ranks of the world; without a process group there is one rank, which always agrees.

    Args:
        name: What the ranks must have in common, e.g. a callback's state key. Objects of one name are matched in the
            order in which each rank made them.
        limit_s: Longest wait for another rank, seconds.
    """

    def __init__(self, name: str, *, limit_s: float = LIMIT_S) -> None:
        self.world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.rank = dist.get_rank() if self.world_size > 1 else 0
        self.limit_s = limit_s
        self._prefix = f"lightning_spectral/{name}/{_used[name]}"
        self._last = ""
        if self.world_size > 1:
            _used[name] += 1

    def exchange(self, topic: str, said: dict[str, Any], *, limit_s: float | None = None) -> list[dict[str, Any]]:
        """What each rank said under ``topic``, in the order of ranks; equal on all of them.

        Args:
            topic: Name of the exchange; used once.
            said: This rank's part; must survive JSON.
            limit_s: Longest wait, if not that of the object.

        Raises:
            MissingRankError: On every rank that came, if one did not come in time or the store's host is gone.
        """
        if self.world_size == 1:
            return [json.loads(json.dumps(said))]
        try:
            return self._through_the_store(topic, said, limit_s)
        except MissingRankError:
            raise
        except RuntimeError as error:  # the process that holds the store has ended
            raise MissingRankError(f"the store of the process group does not answer ({_first_line(error)})") from error

    def _through_the_store(self, topic: str, said: dict[str, Any], limit_s: float | None) -> list[dict[str, Any]]:
        store, key, limit = default_store(), f"{self._prefix}/{topic}", self.limit_s if limit_s is None else limit_s
        if store.check([_MISSED]):
            limit = min(limit, _AFTER_ONE_MISSED_S)
        store.set(f"{key}/{self.rank}", json.dumps(said))
        if self.rank == 0:
            missing = _missing(store, [f"{key}/{rank}" for rank in range(self.world_size)], limit)
            if not missing:
                self._forget(store, key)
                parts = [json.loads(store.get(f"{key}/{rank}")) for rank in range(self.world_size)]
                return _outcome(store.compare_set(f"{key}/decision", "", json.dumps({"parts": parts})))
        else:
            missing = _missing(store, [f"{key}/decision"], limit + _GRACE_S)[:1] and [0]
            if not missing:
                return _outcome(store.get(f"{key}/decision"))
        store.set(_MISSED, "")
        return _outcome(store.compare_set(f"{key}/decision", "", json.dumps({"missing": missing})))

    def _forget(self, store: Any, key: str) -> None:
        """All ranks are here, so all of them have read how the exchange before this one ended."""
        if self._last:
            for end in ("decision", *range(self.world_size)):
                store.delete_key(f"{self._last}/{end}")
        self._last = key


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _outcome(decision: bytes) -> list[dict[str, Any]]:
    content = json.loads(decision)
    if "missing" in content:
        ranks = ", ".join(str(rank) for rank in content["missing"])
        raise MissingRankError(f"rank(s) {ranks} did not come to it in time")
    parts: list[dict[str, Any]] = content["parts"]
    return parts


def _missing(store: Any, keys: Sequence[str], limit_s: float) -> list[int]:
    """Positions of the keys that nobody has written within the limit."""
    try:
        store.wait(list(keys), timedelta(seconds=limit_s))
        return []
    except (RuntimeError, ValueError):  # a DistStoreError is a RuntimeError; the store says no more than "timeout"
        return [place for place, key in enumerate(keys) if not store.check([key])]


def default_store() -> Any:
    """The store of the default process group: private in torch, and read here only."""
    return dist.distributed_c10d._get_default_store()


def wait_limit(busy_s: float) -> float:
    """How long to wait for ranks that may still be computing what this one computed in ``busy_s`` seconds."""
    return max(LIMIT_S, 10 * busy_s)
