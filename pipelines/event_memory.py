"""Memory of a partition's histories: grows in place, and moves to files where it outgrows a budget.

Plain arrays would be copied each time they grow, so that old and new stand side by side. A private
anonymous mapping is extended by the kernel (mremap); pages that were never written cost nothing.
"""

import mmap
import os
import tempfile
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import DTypeLike, NDArray


@dataclass(frozen=True, slots=True)
class Spill:
    """When histories leave memory."""

    max_bytes: int = 0
    """Largest size of one partition's events in memory; 0 means no bound."""
    folder: str = ""
    """Where the files lie; empty means the system's folder for temporary files."""


class EventMemory:
    """One column of rows that grows in place.

    The arrays that `resize` returns view the mapping: drop all of them before the next `resize`.
    """

    def __init__(self, dtype: DTypeLike, width: int) -> None:
        """Hold no rows.

        Args:
            dtype: of the values.
            width: values of a row; 0 makes every array empty.
        """
        self._dtype = np.dtype(dtype)
        self._row_bytes = width * self._dtype.itemsize
        self._mapping: mmap.mmap | None = None
        self._file: int | None = None

    @property
    def in_file(self) -> bool:
        """Whether the rows lie in a file."""
        return self._file is not None

    def resize(self, num_rows: int, *, folder: str | None = None) -> NDArray:
        """Return the rows, now `num_rows` of them, those that were there in front.

        Args:
            num_rows: at least as many as before.
            folder: where to move the rows that lie in memory so far; None leaves them there.

        Raises:
            ValueError: if the folder cannot hold them.
        """
        size = num_rows * self._row_bytes
        if size == 0:
            return np.empty(0, self._dtype)
        if folder is not None and self._file is None:
            self._move(size, folder)
        elif self._mapping is None:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self._mapping = mmap.mmap(-1, size, flags=flags)
        elif size > len(self._mapping):
            if self._file is not None:
                _allocate(self._file, size, folder or "")
            self._mapping.resize(size)
        assert self._mapping is not None
        if self._file is None and hasattr(mmap, "MADV_HUGEPAGE"):
            # Histories are read at random: with pages of 4 KB most reads miss the TLB.
            self._mapping.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(self._mapping, self._dtype, size // self._dtype.itemsize)

    def _move(self, size: int, folder: str) -> None:
        try:
            handle, path = tempfile.mkstemp(prefix="gr-histories-", dir=folder or None)
        except OSError as error:
            raise ValueError(
                f"data.spill_folder={folder!r} cannot be written ({error}): name another folder"
            ) from error
        os.unlink(path)  # whatever ends this process, the file goes with it
        _allocate(handle, size, folder)
        target = mmap.mmap(handle, size)
        if self._mapping is not None:
            target[: len(self._mapping)] = self._mapping
            self._mapping.close()
        self._mapping, self._file = target, handle

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)


class EventColumns:
    """The three columns of events, which grow and spill together."""

    def __init__(self, num_ints: int, num_floats: int, num_codes: int, spill: Spill) -> None:
        """Hold no events; the arguments are the widths of the columns, and when they spill."""
        self._columns = (
            EventMemory(np.int64, num_ints),
            EventMemory(np.float32, num_floats),
            EventMemory(np.uint8, num_codes),
        )
        self._event_bytes = 8 * num_ints + 4 * num_floats + num_codes
        self._spill = spill

    @property
    def in_files(self) -> bool:
        """Whether the events lie in files."""
        return any(column.in_file for column in self._columns)

    def resize(self, num_events: int) -> tuple[NDArray, NDArray, NDArray]:
        """Return int64, float32 and uint8 values of `num_events` events, as `EventMemory` does."""
        bound, folder = self._spill.max_bytes, None
        if bound and num_events * self._event_bytes > bound:
            folder = self._spill.folder
        ints, floats, codes = (c.resize(num_events, folder=folder) for c in self._columns)
        return ints, floats, codes


def spill_of(memory_gb: float, folder: str) -> Spill:
    """Return the rule that a configuration in GB (10^9 bytes) stands for."""
    return replace(Spill(folder=folder), max_bytes=int(memory_gb * 1e9))


def _allocate(handle: int, size: int, folder: str) -> None:
    # Blocks are taken now: in a sparse file a full disk would be a SIGBUS at some later write.
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        raise ValueError(
            f"data.spill_folder={folder!r} has no room for {size:,} bytes of histories ({error}): "
            "free some, name another folder, or raise data.history_memory_gb"
        ) from error
