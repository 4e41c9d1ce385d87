"""Runs a function on several ranks of one machine."""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

# Children fork from a server that has imported the slow libraries once and holds no threads. Where
# there is a GPU, importing TorchRec starts CUDA, which must not happen before a fork.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch"] if torch.cuda.is_available() else ["torch", "torchrec"])

# Values of a parameter `ranks`.
MANY_GPUS = [
    pytest.param(2, marks=pytest.mark.multi_gpu),
    pytest.param(4, marks=pytest.mark.multi_gpu(4)),
]


def run_distributed(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    backend: str = "gloo",
    timeout_s: float = 120.0,
) -> list[Any]:
    """Call fn(*args) in `world_size` new processes that form a group; return what each returned.

    Args:
        fn: a function at the top level of a module; may use torch.distributed.
        world_size: number of processes.
        args: picklable.
        backend: gloo, or nccl (rank r then uses GPU r).
        timeout_s: for all of it, and for each collective.

    Raises:
        AssertionError: if a rank raised, died or took too long; the message holds the tracebacks.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes, readers = [], []
        for rank in range(world_size):
            reader, writer = _CONTEXT.Pipe(duplex=False)
            rendezvous = Path(folder, "rendezvous").as_uri()
            process = _CONTEXT.Process(
                target=_run_rank,
                args=(fn, rank, world_size, args, rendezvous, backend, timeout_s, writer),
                daemon=True,
            )
            process.start()
            writer.close()
            processes.append(process)
            readers.append(reader)
        try:
            return _collect(readers, timeout_s)
        finally:
            for process in processes:
                process.join(timeout=1)
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(readers: list[Connection], timeout_s: float) -> list[Any]:
    deadline = time.monotonic() + timeout_s
    results: dict[int, Any] = {}
    while len(results) < len(readers):
        waiting = {reader: rank for rank, reader in enumerate(readers) if rank not in results}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise AssertionError(f"rank(s) {sorted(waiting.values())} took over {timeout_s} s")
        failures = []
        for reader in ready:
            rank = waiting[reader]
            try:
                succeeded, results[rank] = pickle.loads(reader.recv_bytes())
            except EOFError:
                succeeded, results[rank] = False, "died without an exception"
            if not succeeded:
                failures.append(f"rank {rank}: {results[rank]}")
        if failures:
            raise AssertionError("\n".join(failures))
    return [results[rank] for rank in range(len(readers))]


def _run_rank(
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    args: tuple[Any, ...],
    rendezvous: str,
    backend: str,
    timeout_s: float,
    writer: Connection,
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
    )
    torch.set_num_threads(1)
    try:
        if backend == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(
            backend,
            init_method=rendezvous,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        outcome = (True, fn(*args))
        # A plain pickle: the result must outlive this process, so no shared memory.
        message = pickle.dumps(outcome)
    except BaseException:
        message = pickle.dumps((False, traceback.format_exc()))
    writer.send_bytes(message)
    writer.close()
    if dist.is_initialized():
        dist.destroy_process_group()
