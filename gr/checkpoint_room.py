"""Memory that another process can see too, page-locked where a GPU copies to it."""

import itertools
import math
import mmap
import os
import weakref
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

ALIGNMENT = 64


@dataclass(frozen=True)
class Place:
    """Where in a room a tensor is."""

    room: int
    """Number of the room."""
    offset: int
    """Bytes from its start."""
    shape: tuple[int, ...]
    """Of the tensor, which is contiguous."""
    dtype: torch.dtype
    """Of the tensor."""


class Room:
    """Some bytes, of no file system: they need no room in /dev/shm.

    Args:
        size: bytes.
        handle: descriptor of the memory, if another process made it.
        is_pinned: page-locked, so that a GPU copies to it while the host does something else.
    """

    _rooms: ClassVar["weakref.WeakValueDictionary[int, Room]"] = weakref.WeakValueDictionary()
    _numbers = itertools.count()

    def __init__(self, size: int, handle: int | None = None, *, is_pinned: bool = False) -> None:
        self.size = size
        self.handle = os.memfd_create("checkpoint") if handle is None else handle
        if handle is None:
            os.ftruncate(self.handle, size)
        self._bytes = torch.frombuffer(mmap.mmap(self.handle, size), dtype=torch.uint8)
        self.number = next(self._numbers)
        self._rooms[self.number] = self
        weakref.finalize(self, os.close, self.handle)
        if is_pinned:
            self._pin()

    def tensor(self, place: Place) -> Tensor:
        """Return the tensor at a place."""
        size = math.prod(place.shape) * place.dtype.itemsize
        part = self._bytes[place.offset : place.offset + size]
        return part.view(place.dtype).view(place.shape)

    @classmethod
    def find(cls, tensor: Tensor) -> Place | None:
        """Return where a tensor is, None if in no room of this process."""
        for number, room in cls._rooms.items():
            # An empty tensor, whose address is 0, is everywhere.
            offset = tensor.data_ptr() - room._bytes.data_ptr() if tensor.numel() else 0
            if tensor.is_contiguous() and not tensor.is_cuda and 0 <= offset < room.size:
                return Place(number, offset, tuple(tensor.shape), tensor.dtype)
        return None

    @classmethod
    def size_of(cls, number: int) -> int:
        """Return the bytes of a room of this process."""
        return cls._rooms[number].size

    @classmethod
    def handle_of(cls, number: int) -> int:
        """Return the descriptor of a room of this process."""
        return cls._rooms[number].handle

    def _pin(self) -> None:
        # Where the system refuses, copies still are right, and wait.
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        address = self._bytes.data_ptr()
        if int(runtime.cudaHostRegister(address, self.size, 0)) == 0:
            weakref.finalize(self, runtime.cudaHostUnregister, address)
