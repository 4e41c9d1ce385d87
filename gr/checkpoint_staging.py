"""A copy of a state on the host, which training does not change while it is written."""

from dataclasses import replace

import torch
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.shard import Shard

from gr.checkpoint_state import Tensors


class HostCopy:
    """Copies tensors to host memory, page-locked where they come from a GPU, and keeps the room.

    The room is as large as what a rank saves, and is used again by the next copy.
    """

    def __init__(self) -> None:
        self._room: dict[str, torch.Tensor] = {}

    def copy(self, tensors: Tensors) -> Tensors:
        """Return the tensors as they are now; valid until the next call.

        Args:
            tensors: plain or ShardedTensor, by key; of a ShardedTensor the local shards are copied.
        """
        copies: Tensors = {}
        for key, tensor in tensors.items():
            if isinstance(tensor, ShardedTensor):
                copies[key] = self._shards(key, tensor)
            else:
                copies[key] = self._one(key, tensor)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return copies

    def _one(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()
        if not tensor.is_cuda and type(tensor) is not torch.Tensor:
            return tensor.clone()  # a DTensor of a CPU mesh
        room = self._room.get(key)
        if room is None or room.shape != tensor.shape or room.dtype != tensor.dtype:
            room = torch.empty(
                tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda
            )
            self._room[key] = room
        return room.copy_(tensor, non_blocking=True)

    def _shards(self, key: str, tensor: ShardedTensor) -> torch.Tensor:
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
                tensor=self._one(f"{key}/{i}", shard.tensor),
                metadata=on_host[tuple(shard.metadata.shard_offsets)],
            )
            for i, shard in enumerate(tensor.local_shards())
        ]
        properties = replace(
            metadata.tensor_properties, pin_memory=any(x.tensor.is_pinned() for x in local)
        )
        copied: torch.Tensor = ShardedTensor._init_from_local_shards_and_global_metadata(
            local,
            replace(metadata, shards_metadata=list(on_host.values()), tensor_properties=properties),
            process_group=tensor._process_group,
        )
        return copied
