"""Reading DCP's folders without running what is in them."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo

_INDEX_CLASSES = {
    (cls.__module__, cls.__qualname__): cls
    for cls in (
        dcp_metadata.ChunkStorageMetadata,
        dcp_metadata.Metadata,
        dcp_metadata.MetadataIndex,
        dcp_metadata.StorageMeta,
        dcp_metadata.TensorProperties,
        dcp_metadata.TensorStorageMetadata,
        dcp_metadata._MEM_FORMAT_ENCODING,
        _StorageInfo,
        torch.Size,
    )
}


class _IndexUnpickler(pickle.Unpickler):
    """Reads DCP's index; any other class in it is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _INDEX_CLASSES:
            return _INDEX_CLASSES[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return torch.serialization._get_layout
        if module.split(".")[0] == "pathlib" and name == "PosixPath":
            return Path
        raise ValueError(
            f"the checkpoint's index names {module}.{name}, which no checkpoint of ours holds. "
            "It may be damaged or hostile: do not load it."
        )


class SafeReader(FileSystemReader):
    """FileSystemReader whose index cannot run code; DCP itself reads tensors with weights_only.

    Raises:
        ValueError: if the index is damaged or names what no index of ours does.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        # Read here, since DCP would wrap what is wrong with it into an exception of its own.
        self._index = _read_index(path / ".metadata")

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp_metadata.Metadata:
        """Return the index of the checkpoint."""
        storage_meta = self._index.storage_meta or dcp_metadata.StorageMeta()
        storage_meta.load_id = self.load_id
        self._index.storage_meta = storage_meta
        return self._index


def _read_index(path: Path) -> dcp_metadata.Metadata:
    try:
        with path.open("rb") as file:
            index = _IndexUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error}. Remove this checkpoint.") from error
    for key, entry in index.state_dict_metadata.items():
        if not isinstance(entry, dcp_metadata.TensorStorageMetadata):
            raise ValueError(f"{path} holds {key!r}, which is no tensor: not a checkpoint of ours")
    return index  # type: ignore[no-any-return]
