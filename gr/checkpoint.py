"""Checkpoints: a folder checkpoints/step_N that is complete or not there.

Tensors go through torch.distributed.checkpoint, whatever their sharding; plain values (numbers,
text, lists of them) into checkpoint.json, which is written last. Nothing that was stored is
unpickled but DCP's own index, and that by an unpickler that knows DCP's classes only.
"""

import json
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from gr.atomic import CheckpointError, sync_folder, write_atomically
from gr.checkpoint_reader import SafeReader
from gr.checkpoint_staging import HostCopy
from gr.checkpoint_state import (
    Tensors,
    call_late,
    check_same_model,
    check_values,
    describe,
    fingerprint,
    put,
    split_early,
    split_state,
)
from gr.checkpoint_writer import ReasonedWriter, WriterProcess

COMPLETE = "checkpoint.json"
FORMAT = 1


class _FailedError(Exception):
    """What failed, on any rank; raised on all."""


class CheckpointManager:
    """Saves and loads the checkpoints of a run. Every method is called on all ranks.

    A state is nested dicts whose leaves are tensors (plain, DTensor, ShardedTensor) or values. In
    the place of a part with tensors on the host and values there may be a function that returns it:
    it is called when a GPU has been asked for its tensors, which then need not wait for it.
    A plain tensor is taken to be the same on all ranks that hold its key; what differs from rank to
    rank needs keys that do.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 2,
        apart: Sequence[str] = (),
        asynchronous: bool = False,
        timeout_minutes: float = 10.0,
    ) -> None:
        """Take a folder, which need not be there.

        Args:
            folder: holds step_N folders.
            keep: newest checkpoints kept, at least 1.
            apart: first parts of keys whose shapes or keys depend on the data or on the number of
                ranks (metrics, generators). They are saved; `load` leaves them alone, `read` gets
                them.
            asynchronous: `save` copies the state to host memory and returns; a process writes it.
            timeout_minutes: how long `save` waits for another rank to call it.

        Raises:
            ValueError: if `keep` is below 1.
        """
        if keep < 1:
            raise ValueError(f"checkpoint.keep must be at least 1, got {keep}")
        self.folder = folder
        self.keep = keep
        self.apart = tuple(apart)
        self._host = HostCopy() if asynchronous else None
        self._process = WriterProcess() if asynchronous else None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._timeout = timedelta(minutes=timeout_minutes)
        self._group: dist.ProcessGroup | None = None
        self._writers_group: dist.ProcessGroup | None = None

    def path(self, step: int) -> Path:
        """Return the folder of a checkpoint."""
        return self.folder / f"step_{step}"

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, ascending."""
        return complete_steps(self.folder)

    def latest(self) -> int | None:
        """Return the step of the newest complete checkpoint, None if there is none."""
        steps = self.steps()
        return steps[-1] if steps else None

    def reserve(self, state: dict[str, Any]) -> None:
        """Do early in a run what else its first asynchronous `save` would wait for.

        Args:
            state: as it will be given to `save`.
        """
        if self._host is not None:
            self._host.reserve(split_early(state)[0])
            self._form_groups()
        if self._process is not None:
            with suppress(EOFError, ConnectionError):  # what ended it, the next `save` says
                self._process.wait_until_ready()

    def save(self, step: int, state: dict[str, Any], folders: Sequence[Path] = ()) -> Path:
        """Save a state, then remove what is older than the newest `keep`.

        If it is asynchronous the checkpoint is there after the next `wait`, or `save`, which waits.

        Args:
            step: updates made.
            state: see the class.
            folders: moved into the checkpoint under their own names, the same on all ranks, which
                have made what they wrote into them durable; a folder that is not there is left out.

        Returns:
            The folder of the checkpoint.

        Raises:
            ValueError: if the step is saved already, or the state holds what is neither a tensor
                nor plain, or two ranks hold different plain values under one key.
            CheckpointError: if it cannot be written, on all ranks alike; earlier ones stay as they
                are, and of this one nothing does. If asynchronous: if the one before could not.
        """
        self.wait()
        path = self.path(step)
        if path.exists():
            raise ValueError(f"{path} is there already: a step is saved once")
        self._form_groups()
        tensors, values = split_early(state)
        copies = {} if self._host is None else self._host.copy_from_gpu(tensors)
        tensors, values = call_late(tensors, values)
        copies |= tensors if self._host is None else self._host.copy_from_host(tensors)
        if too_late := sorted(tensors.keys() - copies.keys()):
            raise ValueError(f"expected {too_late[0]!r}, which a function returned, on the host")
        record: dict[str, Any] = {
            "format": FORMAT,
            "step": step,
            "ranks": _world_size(),
            "tensors": self._union(describe(tensors)),
            "values": self._union(values),
        }
        record["fingerprint"] = fingerprint(_without(record["tensors"], self.apart))
        if self._host is None:
            self._write(copies, record, folders)
            return path
        host = self._host

        def write() -> None:
            try:
                host.wait()
                self._write(copies, record, folders)
            except BaseException as error:  # whatever it is, `wait` must not take it for success
                self._failure = error

        self._thread = threading.Thread(target=write, name="checkpoint")
        self._thread.start()
        return path

    def wait(self) -> None:
        """Wait for the checkpoint that is being written, if there is one.

        Raises:
            CheckpointError: if it could not be written, on all ranks alike.
            RuntimeError: if a rank was lost.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Wait as `wait` does, but let a failure be: the run ends with an error of its own."""
        if self._thread is not None:
            self._thread.join()
        if self._host is not None:
            self._host.wait()
        if self._process is not None:
            self._process.close()

    def _form_groups(self) -> None:
        if dist.is_initialized() and self._group is None:
            # Not NCCL's, for which a GPU would have to come to the end of its work.
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)
            # What a thread sends must not mix with that, and it waits as long as disks take.
            self._writers_group = dist.new_group(backend="gloo")

    def _union(self, own: dict[str, Any]) -> dict[str, Any]:
        """Merge dicts over all ranks; a key of several ranks must have one value."""
        parts: list[dict[str, Any]] = [own] * _world_size()
        if dist.is_initialized():
            dist.all_gather_object(parts, own, group=self._group)
        merged: dict[str, Any] = {}
        for rank, part in enumerate(parts):
            for key, value in part.items():
                if repr(merged.setdefault(key, value)) != repr(value):
                    raise ValueError(
                        f"state {key!r} differs between ranks: {merged[key]!r} on one, {value!r} "
                        f"on rank {rank}. Put the rank into the key of what belongs to a rank."
                    )
        return merged

    def _write(self, tensors: Tensors, record: dict[str, Any], folders: Sequence[Path]) -> None:
        """Write a checkpoint so that it is there whole or not at all, and remove the oldest."""
        path = self.path(record["step"])
        draft = path.with_name(f"{path.name}.tmp")
        try:
            self._together(lambda: _begin(draft), on_all=False)
            writer = ReasonedWriter(draft, self._process)
            self._together(
                lambda: dcp_save(
                    dict(tensors),
                    storage_writer=writer,
                    process_group=self._writers_group,
                    no_dist=not dist.is_initialized(),
                )
            )
            self._together(lambda: _complete(draft, path, record, folders), on_all=False)
        except _FailedError as failed:
            if _rank() == 0:
                for folder in (draft, *folders):
                    shutil.rmtree(folder, ignore_errors=True)
            self._together(lambda: None)
            steps = self.steps()
            last = f"the newest is of step {steps[-1]}" if steps else "there is none yet"
            raise CheckpointError(
                f"the checkpoint of step {record['step']} could not be written to {self.folder}: "
                f"{failed}. What was saved before is as it was: {last}. Make room, or look at the "
                "file system"
            ) from failed
        if _rank() == 0:
            for old in self.steps()[: -self.keep]:
                _remove(self.path(old))
        self._together(lambda: None)

    def _together(self, action: Callable[[], Any], *, on_all: bool = True) -> None:
        """Do something on all ranks, or on rank 0, and fail on all if it fails on any."""
        error = ""
        if on_all or _rank() == 0:
            try:
                with _alone_is_fine():
                    action()
            except (OSError, RuntimeError, CheckpointException) as failure:
                error = _reason(failure)
        errors: list[str] = [error] * _world_size()
        if dist.is_initialized():
            dist.all_gather_object(errors, error, group=self._writers_group)
        failed = [each for each in errors if each]
        if failed:
            raise _FailedError(failed[0])

    def load(self, step: int, state: dict[str, Any]) -> None:
        """Load a checkpoint into a state of the same shape.

        Args:
            step: one of `steps()`.
            state: as it was given to `save`. Its tensors are filled in place (those that a function
                returns: what it returned), its plain values replaced, functions too; values that it
                lacks are added, so they need no template.

        Raises:
            ValueError: if the checkpoint is of another model, naming the first differences, or is
                not complete.
        """
        path = self.path(step)
        record = read_record(path)
        tensors, values = (_without(part, self.apart) for part in split_state(state))
        stored = _without(record["values"], self.apart)
        check_same_model(
            path, _without(record["tensors"], self.apart), self._union(describe(tensors))
        )
        check_values(path, stored, values)
        self._read_tensors(path, tensors, no_dist=not dist.is_initialized())
        for key, value in stored.items():
            put(state, key, value)

    def read(self, step: int, prefix: str) -> dict[str, Any]:
        """Return part of a checkpoint with no template. Each rank may ask for another part.

        Args:
            step: one of `steps()`.
            prefix: dotted key of the part, for instance metrics.rank_3.

        Returns:
            Rest of the key -> new tensor on the CPU, or plain value; empty if there is no such
            part.

        Raises:
            ValueError: if the checkpoint is not complete.
        """
        path = self.path(step)
        record = read_record(path)
        start = f"{prefix}."
        tensors = {
            key: torch.empty(each["shape"], dtype=getattr(torch, each["dtype"]))
            for key, each in record["tensors"].items()
            if key.startswith(start)
        }
        self._read_tensors(path, tensors, no_dist=True)
        values = {k: v for k, v in record["values"].items() if k.startswith(start)}
        return {key.removeprefix(start): leaf for key, leaf in (tensors | values).items()}

    def num_ranks(self, step: int) -> int:
        """Return the number of ranks that saved a checkpoint."""
        return int(read_record(self.path(step))["ranks"])

    def _read_tensors(self, path: Path, tensors: Tensors, *, no_dist: bool) -> None:
        with _alone_is_fine():
            dcp_load(dict(tensors), storage_reader=SafeReader(path), no_dist=no_dist)


def complete_steps(folder: Path) -> list[int]:
    """Return the steps of the complete checkpoints in `folder`, ascending."""
    numbers = [p.parent.name.removeprefix("step_") for p in folder.glob(f"step_*/{COMPLETE}")]
    return sorted(int(number) for number in numbers if number.isdecimal())


def read_record(path: Path) -> dict[str, Any]:
    """Return the record (checkpoint.json) of a checkpoint.

    Raises:
        ValueError: if there is none, or it is of another format.
    """
    if not (path / COMPLETE).is_file():
        raise ValueError(
            f"{path} is no complete checkpoint: expected a file {COMPLETE} in it. "
            f"Complete ones beside it: {complete_steps(path.parent) or 'none'}."
        )
    try:
        record = json.loads((path / COMPLETE).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path / COMPLETE}: expected JSON: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{path / COMPLETE}: expected format {FORMAT}, found {found}")
    return record


def _begin(draft: Path) -> None:
    """Make the folder of a checkpoint that is not complete, and sweep up those of killed saves."""
    draft.parent.mkdir(parents=True, exist_ok=True)
    for leftover in draft.parent.glob("step_*.tmp"):
        shutil.rmtree(leftover)
    draft.mkdir()


def _complete(draft: Path, path: Path, record: dict[str, Any], folders: Sequence[Path]) -> None:
    for folder in folders:
        if folder.is_dir():
            sync_folder(folder)
            folder.rename(draft / folder.name)
    write_atomically(draft / COMPLETE, json.dumps(record, indent=1))
    draft.rename(path)
    sync_folder(path.parent)


def _reason(failure: BaseException) -> str:
    """Return what went wrong first, of what DCP wraps on each rank."""
    if isinstance(failure, CheckpointException):
        rank, (first, _) = next(iter(failure.failures.items()))
        return f"rank {rank}: {type(first).__name__}: {first}"
    return f"rank {_rank()}: {type(failure).__name__}: {failure}"


def _without(part: dict[str, Any], apart: Sequence[str]) -> dict[str, Any]:
    return {key: leaf for key, leaf in part.items() if key.split(".", 1)[0] not in apart}


def _remove(path: Path) -> None:
    """Remove a checkpoint, renamed to a draft first: after a kill the next save sweeps it up."""
    shutil.rmtree(path.rename(path.with_name(f"{path.name}.tmp")))


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    """Silence DCP's remark that a single process saves or loads: it is what `no_dist` asks for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
