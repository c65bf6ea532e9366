"""The order of what compiled regions leave: each hook has a list of its own, what happened between two is lost.

It is found again from where hooks are: what lies inside a module happened in one of that module's calls, each of which
had an equal share of it, round by round in the order in which a forward meets the hooks. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar


class Traced(Protocol):
    """What a hook tells: its kind, the path of its module, and what it has recorded."""

    kind: str
    path: str
    traced: list[Any]


HookT = TypeVar("HookT", bound=Traced)


@dataclass
class _Member(Generic[HookT]):
    """A hook, or a module that encloses others: what opens it, what is inside, what closes it."""

    hook: HookT
    inside: list[_Member[HookT]] = field(default_factory=list)
    close: HookT | None = None

    @property
    def count(self) -> int:
        """How often it ran."""
        return len(self.hook.traced)

    def run(self, index: int) -> Iterator[tuple[HookT, Any]]:
        """What its run of this index left."""
        yield self.hook, self.hook.traced[index]
        if self.hook.kind == "open":
            yield from _rounds(self.inside, index, self.count)
            if self.close is not None and index < len(self.close.traced):
                yield self.close, self.close.traced[index]


def in_order(hooks: Sequence[HookT]) -> Iterator[tuple[HookT, Any]]:
    """Hooks and what they recorded, in the order in which it happened.

    Args:
        hooks: Those that have recorded something, in the order in which a forward would meet them; but for the ends of
            enclosing modules, which come last, and their beginnings, which come first, outermost before innermost.
    """
    frames = {hook.path: _Member(hook) for hook in hooks if hook.kind == "open"}
    for hook in hooks:
        if hook.kind == "close" and hook.path in frames:
            frames[hook.path].close = hook
    roots: list[_Member[HookT]] = []
    placed: set[str] = set()

    def place(path: str) -> list[_Member[HookT]]:
        """Where a module's members go, after the modules around it have been put into theirs."""
        if path not in placed:
            placed.add(path)
            around = _around(path, frames)
            (roots if around is None else place(around)).append(frames[path])
        return frames[path].inside

    for hook in hooks:
        if hook.kind == "open" or (hook.kind == "close" and hook.path in frames):
            continue
        around = _around(hook.path, frames)
        (roots if around is None else place(around)).append(_Member(hook))
    for path in frames:
        place(path)
    return _rounds(roots, 0, 1)


def _around(path: str, frames: dict[str, _Member[HookT]]) -> str | None:
    """The innermost of the modules around a path."""
    parts = path.split(".") if path else []
    ends = range(len(parts) - 1, -1, -1)
    return next((outer for end in ends if (outer := ".".join(parts[:end])) in frames), None)


def _rounds(members: Sequence[_Member[HookT]], index: int, of: int) -> Iterator[tuple[HookT, Any]]:
    """Each member's share of one of several runs of what is around them, one after the other."""
    shares = [range(member.count * index // of, member.count * (index + 1) // of) for member in members]
    for turn in range(max(map(len, shares), default=0)):
        for member, share in zip(members, shares, strict=True):
            if turn < len(share):
                yield from member.run(share[turn])
