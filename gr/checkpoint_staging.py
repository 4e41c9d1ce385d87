"""A copy of a state on the host, which training does not change while it is written."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.shard import Shard

from gr.checkpoint_room import ALIGNMENT, Place, Room
from gr.checkpoint_state import Tensors

GROWTH = 2
"""What grows from copy to copy (metrics) gets so much more room than it needs, which costs nothing
until it is used; what a GPU fills is page-locked and gets what it needs."""


class HostCopy:
    """Copies tensors to memory of the host that a process that writes them sees too.

    The room is as large as what a rank saves, page-locked where it comes from a GPU, and used again
    by the next copy.
    """

    def __init__(self) -> None:
        self._rooms: dict[bool, Room] = {}  # by whether it is for what comes from a GPU
        self._used = 0
        self._event: torch.cuda.Event | None = None

    def reserve(self, tensors: Tensors) -> None:
        """Make room for tensors like these: to lock the pages of gigabytes takes a second.

        Args:
            tensors: plain or ShardedTensor, by key.
        """
        for from_gpu in (True, False):
            self._reserve(tensors, from_gpu=from_gpu)

    def copy_from_gpu(self, tensors: Tensors) -> Tensors:
        """Return those on a GPU as they are now: whole after `wait`, valid until the next call.

        It copies before it does what it is asked for later, so that training may go on at once.

        Args:
            tensors: plain or ShardedTensor, by key; of a ShardedTensor the local shards are copied.
        """
        copies = self._copy(tensors, from_gpu=True)
        if torch.cuda.is_available():
            self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._event.record()  # type: ignore[no-untyped-call]
        return copies

    def copy_from_host(self, tensors: Tensors) -> Tensors:
        """Return those on the host as they are now, valid until the next call.

        Args:
            tensors: likewise.
        """
        return self._copy(tensors, from_gpu=False)

    def wait(self) -> None:
        """Wait until a GPU has copied what `copy_from_gpu` returned; any thread may."""
        if self._event is not None:
            self._event.synchronize()  # type: ignore[no-untyped-call]

    def _reserve(self, tensors: Tensors, *, from_gpu: bool) -> None:
        chosen = [x for tensor in tensors.values() for x in _local(tensor) if x.is_cuda == from_gpu]
        size = sum(map(_aligned, chosen)) or int(not from_gpu)
        room = self._rooms.get(from_gpu)
        if size > (0 if room is None else room.size):
            if from_gpu:
                self.wait()  # a save that failed may have left a copy under way
            self._rooms.pop(from_gpu, None)  # before there are two
            size *= 1 if from_gpu else GROWTH
            self._rooms[from_gpu] = Room(size, is_pinned=from_gpu)

    def _copy(self, tensors: Tensors, *, from_gpu: bool) -> Tensors:
        chosen = {key: tensor for key, tensor in tensors.items() if _is_cuda(tensor) == from_gpu}
        self._reserve(chosen, from_gpu=from_gpu)
        self._used = 0
        return {
            key: self._shards(tensor) if isinstance(tensor, ShardedTensor) else self._one(tensor)
            for key, tensor in chosen.items()
        }

    def _one(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if not tensor.is_cuda and type(tensor) is not Tensor:
            return tensor.clone()  # a DTensor of a CPU mesh
        room, offset = self._rooms[tensor.is_cuda], self._used
        self._used += _aligned(tensor)
        copied = room.tensor(Place(room.number, offset, tuple(tensor.shape), tensor.dtype))
        return copied.copy_(tensor, non_blocking=True)

    def _shards(self, tensor: ShardedTensor) -> Tensor:
        metadata = tensor.metadata()
        on_host = {
            tuple(shard.shard_offsets): ShardMetadata(
                shard.shard_offsets,
                shard.shard_sizes,
                f"rank:{shard.placement.rank()}/cpu",  # type: ignore[union-attr]
            )
            for shard in metadata.shards_metadata
        }
        local = [
            Shard(
                tensor=self._one(shard.tensor),
                metadata=on_host[tuple(shard.metadata.shard_offsets)],
            )
            for shard in tensor.local_shards()
        ]
        properties = replace(
            metadata.tensor_properties, pin_memory=any(x.tensor.is_pinned() for x in local)
        )
        copied: Tensor = ShardedTensor._init_from_local_shards_and_global_metadata(
            local,
            replace(metadata, shards_metadata=list(on_host.values()), tensor_properties=properties),
            process_group=tensor._process_group,
        )
        return copied


def _local(tensor: Tensor) -> list[Tensor]:
    if isinstance(tensor, ShardedTensor):
        return [shard.tensor for shard in tensor.local_shards()]
    return [tensor]


def _is_cuda(tensor: Tensor) -> bool:
    return any(each.is_cuda for each in _local(tensor))


def _aligned(tensor: Tensor) -> int:
    size = tensor.numel() * tensor.element_size()
    return -(-size // ALIGNMENT) * ALIGNMENT
