"""Run one function in several gloo processes and hand back what each returned, or raise a child's traceback.

Children are forked, pose as torchelastic (so that Lightning starts nothing itself) and leave with ``os._exit``: the
normal exit of a process that used gloo aborted in about one of five runs after a correct result.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, init: bool = True, timeout_s: float = 60
) -> list[Any]:
    """Call ``function(rank, world_size, *args)`` in ``world_size`` processes.

    Args:
        function: Anything callable (a fork needs no pickling); its results must be picklable.
        world_size: Number of processes.
        args: Passed on.
        init: Start a gloo process group first; False leaves that to Lightning.
        timeout_s: After this the children are killed.

    Returns:
        One result per rank.

    Raises:
        RuntimeError: With the first child's traceback, or when a child died or took too long.
    """
    port = _free_port()
    pids, pipes = [], []
    for rank in range(world_size):
        ours, theirs = Pipe(duplex=False)
        pid = os.fork()
        if pid == 0:
            _child(function, rank, world_size, args, port, init, theirs)
        theirs.close()
        pids.append(pid)
        pipes.append(ours)
    try:
        results = _collect(pipes, timeout_s)
    except BaseException:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        raise
    finally:
        for pid in pids:
            os.waitpid(pid, 0)
    return results


def _collect(pipes: list[Connection], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    open_pipes = {pipe: rank for rank, pipe in enumerate(pipes)}
    while open_pipes:
        ready = wait(list(open_pipes), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RuntimeError(f"ranks {sorted(open_pipes.values())} gave no result within {timeout_s} s")
        for pipe in ready:
            rank = open_pipes.pop(pipe)  # type: ignore[call-overload]
            try:
                ok, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                raise RuntimeError(f"rank {rank} died without a result") from None
            if not ok:
                raise RuntimeError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _child(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    args: tuple[Any, ...],
    port: int,
    init: bool,
    pipe: Connection,
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="tests",
    )
    torch.set_num_threads(1)  # OpenMP's pool does not survive a fork
    gc.freeze()  # optimizers look for wrappers on the heap: not among the millions of objects of the parent
    try:
        if init:
            dist.init_process_group("gloo", rank=rank, world_size=world_size)
        message = (True, function(rank, world_size, *args))
    except BaseException:
        message = (False, traceback.format_exc())
    try:
        payload = pickle.dumps(message)
    except Exception:
        payload = pickle.dumps((False, traceback.format_exc()))
    try:
        if message[0] and dist.is_initialized():
            dist.barrier()  # nobody leaves while a peer still talks to it
        pipe.send_bytes(payload)
    finally:
        os._exit(0)  # whatever happens, a child must not go on as a second test runner


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
