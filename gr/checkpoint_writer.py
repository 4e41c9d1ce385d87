"""A process that writes the tensors of a checkpoint to files, so that training keeps its own.

    python -m gr.checkpoint_writer SOCKET      # started by `WriterProcess`

A thread of the training process would need Python's lock for every tensor, and each time that it
holds it, the thread that launches kernels waits. What is written lies in memory that both processes
see (gr/checkpoint_staging.py); plans and metadata stay with torch.distributed.checkpoint in the
training process.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable
from multiprocessing import reduction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from gr.checkpoint_room import Place, Room

_PR_SET_PDEATHSIG = 1
_ROOT = Path(__file__).parents[1]


Places = dict[MetadataIndex, Place]


class ReasonedWriter(FileSystemWriter):
    """Says why a file could not be written: torch's error names a position in it instead.

    Args:
        folder: of the checkpoint.
        process: writes in the place of this one.
    """

    def __init__(self, folder: Path, process: "WriterProcess | None" = None) -> None:
        super().__init__(folder, sync_files=True)
        self.process = process

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's tensors."""
        try:
            places = None if self.process is None else _places(plan, planner)
            if self.process is None or places is None:
                return super().write_data(plan, planner)
            results: Future[list[WriteResult]] = Future()
            results.set_result(self.process.write(Path(self.path), plan, places))
            return results
        except Exception as failure:
            cause: BaseException | None = failure
            while cause is not None:
                if isinstance(cause, OSError):
                    raise OSError(cause.errno, cause.strerror) from failure
                cause = cause.__cause__ or cause.__context__
            raise


class WriterProcess:
    """Starts the process, and again if it was killed; it ends with the one that started it."""

    def __init__(self) -> None:
        self._known: set[int] = set()
        self._is_ready = False
        self._start()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Wait until the process has started, which takes seconds."""
        if not self._is_ready:
            self._is_ready = self._connection.recv()

    def write(self, folder: Path, plan: SavePlan, places: Places) -> list[WriteResult]:
        """Let the process write the tensors of a plan, and wait for it.

        Raises:
            OSError: if it could not, or was killed.
            RuntimeError: if something else failed.
        """
        if self._process.poll() is not None:
            self._start()
        rooms = {place.room for place in places.values()}
        try:
            self.wait_until_ready()
            for room in rooms - self._known:
                self._connection.send((room, Room.size_of(room)))
                reduction.send_handle(self._connection, Room.handle_of(room), self.pid)
            self._known = rooms
            self._connection.send((folder, plan, places))
            answer = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            status = self._process.wait()
            self._end()
            raise OSError(
                0, f"the process that writes checkpoints ended with status {status}"
            ) from error
        if isinstance(answer, BaseException):
            raise answer
        results: list[WriteResult] = answer
        return results

    def close(self) -> None:
        """End the process; it has nothing to write."""
        self._end()

    def _start(self) -> None:
        own, theirs = socket.socketpair()
        path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        # Without a GPU, of which it would take memory; in a session of its own, so that ctrl-C
        # reaches the training process alone.
        environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "gr.checkpoint_writer", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=environment | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        self._connection = Connection(own.detach())
        self._known, self._is_ready = set(), False
        self._end: Callable[[], Any] = weakref.finalize(self, _end, self._connection, self._process)


class _Placed(SavePlanner):
    """Finds the tensors of a plan."""

    def __init__(self, values: dict[MetadataIndex, torch.Tensor]) -> None:
        self.values = values

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        """Return the tensor of an item."""
        return self.values[write_item.index]

    def set_up_planner(self, *args: Any, **options: Any) -> None:
        """Refuse, as the other three do: the plan is made in the process that trains."""
        raise NotImplementedError("the writer of a checkpoint is given its plan and makes none")

    create_local_plan = create_global_plan = finish_plan = set_up_planner  # type: ignore[assignment]


def _end(connection: Connection, process: "subprocess.Popen[bytes]") -> None:
    connection.close()
    process.wait()


def _places(plan: SavePlan, planner: SavePlanner) -> Places | None:
    """Return where the tensors of a plan are, None if not all are where another process sees."""
    places: Places = {}
    for item in plan.items:
        value = planner.resolve_data(item)
        place = Room.find(value) if isinstance(value, torch.Tensor) else None
        if place is None:
            return None
        places[item.index] = place
    return places


def serve(connection: Connection) -> None:
    """Write what is asked for until the other end is closed."""
    rooms: dict[int, Room] = {}
    connection.send(True)
    while True:
        try:
            request = connection.recv()
        except (EOFError, ConnectionError):
            return
        if len(request) == 2:
            number, size = request
            rooms[number] = Room(size, reduction.recv_handle(connection))
            continue
        folder, plan, places = request
        # What is not asked for has been left.
        rooms = {number: rooms[number] for number in {place.room for place in places.values()}}
        try:
            found = {index: rooms[place.room].tensor(place) for index, place in places.items()}
            answer: Any = ReasonedWriter(folder).write_data(plan, _Placed(found)).wait()
            del found
        except OSError as error:
            answer = OSError(error.errno, error.strerror)
        except Exception as error:
            answer = RuntimeError(f"{type(error).__name__}: {error}")
        connection.send(answer)


def main() -> None:
    """Serve the process that started this one, and end with it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    main()
