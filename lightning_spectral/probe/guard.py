"""Nothing that goes wrong in a measurement reaches the training: it is remembered, and told once per kind."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning_spectral.text import one_line


def warn(message: str) -> None:
    """A plain Python warning; where warnings are errors it is logged instead, so that a script runs on."""
    try:
        warnings.warn(message, stacklevel=3)
    except UserWarning:
        logging.getLogger("lightning_spectral").warning(message)


_FOLLOWS = {
    "not_written": "records are kept in memory and tried again at every window",
    "not_opened": "this window is lost, the next one tries again",
    "not_closed": "what was written before stays",
    "not_logged": "records are written all the same",
}


class DeliberateError(RuntimeError):
    """An error that the user has asked for (``strict``, ``on_nonfinite="raise"``): it reaches the training."""


class Guard:
    """Runs parts of a measurement and keeps their errors.

    Args:
        name: Who says it, e.g. the callback's class.
        strict: Raise instead.
        tell: How to warn; told once per kind of trouble.

    Attributes:
        trouble: Status and reason of the first error since the last :meth:`take`, or ``None``.
    """

    def __init__(self, name: str, *, strict: bool = False, tell: Callable[[str], None] = warn) -> None:
        self.name, self.strict, self.tell = name, strict, tell
        self.trouble: tuple[str, str] | None = None
        self._told: set[str] = set()

    @contextmanager
    def __call__(self, what: str, status: str = "solve_failed") -> Iterator[None]:
        """Keep an error of the block: ``what`` was being done, and a window that it hits gets ``status``."""
        try:
            yield
        except DeliberateError:
            raise
        except Exception as error:
            if self.strict:
                raise
            reason = one_line(f"{what}: {type(error).__name__}: {error}")
            self.trouble = self.trouble or (status, reason)
            follows = _FOLLOWS.get(status, f"the window is recorded as `{status}`")
            self.say(f"{what}:{type(error).__name__}", f"{reason}. Training goes on; {follows}.")

    def take(self) -> tuple[str, str] | None:
        """The trouble so far, which is then forgotten."""
        trouble, self.trouble = self.trouble, None
        return trouble

    def say(self, kind: str, message: str, *, on_every_rank: bool = False) -> None:
        """Warn, once per kind; by default where the host says, which is rank 0."""
        if kind not in self._told:
            self._told.add(kind)
            (warn if on_every_rank else self.tell)(f"{self.name}: {message}")
