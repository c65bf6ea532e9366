"""Worker processes that do not outlive what started them."""

from __future__ import annotations

import multiprocessing
import os
import threading


def end_with_the_parent() -> None:
    """In a worker of a pool: end when the process that started it is gone, also by a kill.

    Workers of ``ProcessPoolExecutor`` wait for their next task for ever then, in all the memory that they hold.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_wait_for, args=(parent,), daemon=True).start()


def _wait_for(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)
