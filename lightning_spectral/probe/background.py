"""Windows solved in a background thread: eigensolves release the GIL, so an idle core solves them at no cost.

One window at most of an observer is being solved; the next one waits for it. Results are published by the training
thread, in the order in which windows ended, those of other observers of the run folder included: where two measure the
same, whose records stay is no matter of whose solve is faster. They are the same numbers as without a thread.
Collectives never leave the training thread: with several ranks each solves its layers, and they exchange results at the
next synchronisation point of all (the next window, a checkpoint, the end), however long each took.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from lightning_spectral.probe.results import SiteResult

Solve = Callable[[], list[SiteResult]]
Publish = Callable[[list[SiteResult]], dict[str, float]]


class BackgroundSolver:
    """At most one solve under way, and what is to be done with its result.

    Args:
        alone: Whether publishing needs no other rank.
    """

    def __init__(self, *, alone: bool = True) -> None:
        self._alone = alone
        self._thread: ThreadPoolExecutor | None = None
        self._pending: tuple[Future[list[SiteResult]], Publish] | None = None
        self._queue: list[BackgroundSolver] = []  # all that solve a window of one run folder, in the order of the ends
        self._published: dict[str, float] = {}  # what another one's turn made this one publish

    def submit(self, solve: Solve, publish: Publish, queue: list[BackgroundSolver] | None = None) -> dict[str, float]:
        """Start a solve; the one before is waited for and published first. Returns what that one published.

        Args:
            solve: What runs in the thread.
            publish: What is done with its result, in the training thread.
            queue: Of the run folder, shared by all that measure for it.
        """
        published = self.drain()
        self._queue = [] if queue is None else queue
        self._queue.append(self)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spectral-solve")
        self._pending = (self._thread.submit(solve), publish)
        return published

    def poll(self) -> dict[str, float]:
        """Publish the window under way if it is solved; never waits, so with other ranks it does nothing."""
        is_next = self._alone and self._pending is not None and self._queue[0] is self
        return self.drain() if is_next and self._pending is not None and self._pending[0].done() else {}

    def drain(self) -> dict[str, float]:
        """Wait for the window under way and publish it, after those that ended before it. Errors are raised here."""
        while self._pending is not None:
            self._queue[0]._publish_next()
        published, self._published = self._published, {}
        return published

    def drain_alone(self) -> dict[str, float]:
        """Drain if that needs no other rank."""
        return self.drain() if self._alone else {}

    def _publish_next(self) -> None:
        assert self._pending is not None
        future, publish = self._pending
        self._drop()
        self._published |= publish(future.result())

    def _drop(self) -> None:
        if self._pending is not None:
            self._pending = None
            self._queue.remove(self)

    def drain_after_error(self) -> bool:
        """After an error: drain if no other rank is needed, who may not come. Returns whether nothing was lost."""
        if not self._alone and self._pending is not None:
            self._drop()
            return False
        self.drain()
        return True

    def abandon(self) -> None:
        """Drop the pending window: the other ranks are gone."""
        self._drop()
        self.close()

    def close(self) -> None:
        """Drain and end the thread."""
        try:
            self.drain()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
                self._thread = None


def has_free_core(device: torch.device, num_processes: int = 1) -> bool:
    """Whether a second set of threads of each process on this machine would find cores of its own.

    On an accelerator the solve would queue behind training on the same stream: nothing is gained there.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return device.type == "cpu" and cores >= 2 * torch.get_num_threads() * num_processes
