"""Ranks and processes. The only place that reads the launcher's environment."""

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gr.config import TrainConfig

# In messages of gloo, of NCCL and of the store.
_SIGNS_OF_A_LOST_RANK = (
    *("Connection closed by peer", "Connection reset by peer", "Timed out waiting"),
    *("pair closure", "remote process exited", "Broken pipe", "Failed to recv, got 0 bytes"),
)
_ended_groups: list[Any] = []


@dataclass(frozen=True)
class World:
    """This process among all of the job."""

    rank: int
    """0 .. size - 1."""
    size: int
    """Number of processes."""
    device: torch.device
    """Where this process computes."""
    owns_group: bool = False
    """Whether `start` formed the process group, so that `stop` ends it."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once a job."""
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of `x` over all ranks."""
        if self.size > 1:
            x = x.clone()
            dist.all_reduce(x)
        return x

    def on_main(self, action: Callable[[], Any]) -> None:
        """Do something on rank 0, and fail on every rank if it fails there.

        Raises:
            ValueError, OSError: what `action` raised on rank 0.
        """
        error: list[ValueError | OSError | None] = [None]
        if self.is_main:
            try:
                action()
            except (ValueError, OSError) as failure:
                error[0] = failure
        if self.size > 1:
            dist.broadcast_object_list(error)
        if error[0] is not None:
            raise error[0]

    def from_rank_0(self, value: str) -> str:
        """Return rank 0's value on every rank."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def agree(self, what: str, value: str) -> None:
        """Refuse to go on if the ranks hold different values.

        Args:
            what: names the value in the message.
            value: this rank's.

        Raises:
            ValueError: naming a rank that differs from rank 0, and both values.
        """
        if self.size == 1:
            return
        values: list[str] = [""] * self.size
        dist.all_gather_object(values, value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise ValueError(
                    f"all ranks must have the same {what}, but rank {rank} differs from rank 0: "
                    f"{_first_difference(values[0], other)}. Start every rank with the same "
                    "command and files."
                )


def environment_rank() -> int:
    """Return the rank that the launcher gave to this process, 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def environment_job() -> str:
    """Return the id of the job that this process belongs to, the same after a restart; or ""."""
    job = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return "" if job == "none" else job  # torchrun's default, which is no id


def lost_rank(error: BaseException) -> str | None:
    """Return a message if an error means that another rank is gone or late, else None."""
    text = str(error).strip().split("\n", 1)[0]
    if not any(sign in text for sign in _SIGNS_OF_A_LOST_RANK):
        return None
    # Gloo adds advice after its first sentence.
    return (
        "lost contact with another rank: it died, hangs, or cannot be reached. What it printed "
        f"last says why; all that this rank saw is: {text.split('. This is typically')[0][:300]}"
    )


def start(device: str, *, needs_group: bool = False, timeout_minutes: float = 10.0) -> World:
    """Join the job that torchrun started, or stand alone.

    Args:
        device: auto, cpu or cuda; auto is CUDA where there is one.
        needs_group: form a process group also of a single CPU process, as TorchRec needs.
        timeout_minutes: how long a rank waits for the others, here and in every collective.

    Raises:
        ValueError: if CUDA is asked for and there is none, or fewer GPUs than local ranks; if not
            all ranks come in time.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no GPU here. Use device=cpu.")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"local rank {local_rank} has no GPU of its own: this host has "
                f"{torch.cuda.device_count()}. Start at most as many processes a host."
            )
        torch.cuda.set_device(local_rank)
        where = torch.device("cuda", local_rank)
    else:
        where = torch.device("cpu")
    forms_group = not dist.is_initialized() and (size > 1 or device == "cuda" or needs_group)
    if forms_group:
        _set_lonely_rendezvous(size)
        try:
            dist.init_process_group(
                "nccl" if device == "cuda" else "gloo",
                timeout=timedelta(minutes=timeout_minutes),
                device_id=where if device == "cuda" else None,
            )
        except (dist.DistStoreError, dist.DistNetworkError) as error:
            at = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise ValueError(
                f"rank {environment_rank()} waited {timeout_minutes:g} min at {at} for {size} "
                "ranks, but not all came. Start as many processes as WORLD_SIZE says (torchrun "
                "does), on hosts that reach that address; raise timeout_minutes where they start "
                f"slowly. ({str(error).splitlines()[0]})"
            ) from error
    return World(environment_rank(), size, where, forms_group)


def stop(world: World) -> None:
    """Leave the job, unless the caller of `start` had joined it already."""
    if world.owns_group:
        # The last owner of a group joins its threads, and one of these may be waiting for Python's
        # lock to let go of the tensor that it sent last. Python's own reference gives the lock up
        # for that; DistributedDataParallel's, which outlives this function, does not, and the
        # process would never end (torch 2.13, gloo). So a reference is kept.
        _ended_groups.append(dist.group.WORLD)
        dist.destroy_process_group()


@contextmanager
def joined(config: TrainConfig) -> Iterator[World]:
    """Join the job as the configuration of a run says, and leave it at the end.

    Args:
        config: `device`, `deterministic`, `timeout_minutes` and `embeddings.form` are read.

    Raises:
        ValueError: as `start`.
    """
    set_determinism(config.deterministic)
    world = start(
        config.device,
        needs_group=config.embeddings.form == "sharded",
        timeout_minutes=config.timeout_minutes,
    )
    try:
        yield world
    finally:
        stop(world)


def device_name(device: torch.device) -> str:
    """Return what a device is called: that of a GPU, or CPU and the kind of machine."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"CPU ({platform.machine()})"


def set_determinism(deterministic: bool) -> None:
    """Make arithmetic bit-reproducible, or let every library choose the fastest."""
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        # cuBLAS needs a fixed workspace for reproducible sums; it reads this at its first call.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def _set_lonely_rendezvous(size: int) -> None:
    # TorchRec needs a process group even for one process; torchrun sets these for many.
    if size == 1 and "MASTER_ADDR" not in os.environ:
        os.environ.update(
            MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0"
        )


def _first_difference(a: str, b: str) -> str:
    for line_a, line_b in zip(a.splitlines(), b.splitlines(), strict=False):
        if line_a != line_b:
            return f"{line_a.strip()!r} against {line_b.strip()!r}"
    return f"{len(a.splitlines())} against {len(b.splitlines())} lines"
