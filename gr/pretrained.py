"""Frozen vectors of ids, from a file: never trained, projected by the model.

Letters: E ids with a vector, W width of a vector, n ids of a batch, D model dim.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gr.config import PretrainedConfig, VectorFileConfig
from pipelines.portable_hash import string_id

WITHOUT_VECTOR = -1


class FrozenVectors(nn.Module):
    """The vectors of a file, by id.

    They are no part of a checkpoint, which keeps a digest of them instead.

    Args:
        key: of the configuration, for messages.
        config: the file.

    Raises:
        ValueError: if the file cannot be read, or repeats an id.
    """

    def __init__(self, key: str, config: VectorFileConfig) -> None:
        super().__init__()
        self.key, self.path = key, config.path
        ids, vectors = read_vectors(key, config)
        order = np.argsort(ids, kind="stable")
        # On the CPU, where ids are looked up.
        self.sorted_ids = torch.from_numpy(np.ascontiguousarray(ids[order]))
        same = (self.sorted_ids[1:] == self.sorted_ids[:-1]).nonzero()
        if len(same):
            raise ValueError(
                f"{key}.path={config.path}: id {int(self.sorted_ids[same[0]])} "
                "has more than one vector: keep one row an id"
            )
        self.vectors_EW: Tensor
        vectors = np.ascontiguousarray(vectors[order])
        self.register_buffer("vectors_EW", torch.from_numpy(vectors), persistent=False)
        self.expected_digest = _digest(self.sorted_ids.numpy(), vectors)
        self.digest: Tensor
        self.register_buffer("digest", torch.tensor(self.expected_digest))

    def find(self, ids_n: Tensor) -> Tensor:
        """Return (n,) int64: the row of each raw id, -1 where it has no vector. On the CPU."""
        return find_rows(self.sorted_ids, ids_n)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        found = state_dict.get(f"{prefix}digest")
        if found is not None and int(found) != self.expected_digest:
            raise ValueError(
                f"{self.key}.path={self.path} holds other vectors than "
                "those that the checkpoint was trained with: restore the file, or train anew"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[no-untyped-call]


class PretrainedVectors(FrozenVectors):
    """y = W v of the id's vector v; an id without one has a learned y of its own.

    Args:
        name: of the vectors in model.pretrained, for messages.
        config: the file, and the feature whose ids it knows.
        dim: D.

    Raises:
        ValueError: if the file cannot be read, or repeats an id.
    """

    def __init__(self, name: str, config: PretrainedConfig, dim: int) -> None:
        super().__init__(f"model.pretrained.{name}", config)
        self.config = config
        self.project = nn.Linear(self.vectors_EW.shape[1], dim, bias=False)
        self.missing_D = nn.Parameter(torch.randn(dim) * 0.02)

    def forward(self, row_n: Tensor) -> Tensor:
        """Return (n, D) of rows that `find` gave."""
        weight = self.project.weight
        vector_nW = self.vectors_EW[row_n.clamp_min(0)].to(weight.dtype)
        projected_nD: Tensor = self.project(vector_nW)
        return torch.where((row_n >= 0)[:, None], projected_nD, self.missing_D.to(weight.dtype))


def find_rows(sorted_ids_E: Tensor, ids_n: Tensor) -> Tensor:
    """Return (n,) int64: where each id stands among ascending ones, -1 where it does not."""
    if not len(sorted_ids_E):
        return torch.full_like(ids_n, WITHOUT_VECTOR)
    row_n = torch.searchsorted(sorted_ids_E, ids_n).clamp_max(len(sorted_ids_E) - 1)
    return row_n.where(sorted_ids_E[row_n] == ids_n, WITHOUT_VECTOR)


def read_vectors(key: str, config: VectorFileConfig) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Return (E,) ids and (E, W) float16 or float32 vectors of a file.

    Args:
        key: of the configuration, for messages.
        config: the file.

    Raises:
        ValueError: if it is missing, of another form, or holds a value that is not finite.
    """
    path = Path(config.path)
    if not path.is_file():
        raise ValueError(f"{key}.path={path}: there is no such file")
    if path.suffix == ".npy":
        ids, vectors = _read_npy(key, path)
    else:
        ids, vectors = _read_parquet(key, path, config)
    if vectors.dtype != np.float16:
        vectors = vectors.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise ValueError(
            f"{key}.path={path}: the vector in row {bad[0]} is not finite; {len(bad)} row(s) in "
            "all: leave these ids out of the file"
        )
    return ids, vectors


def _read_npy(key: str, path: Path) -> tuple[NDArray[np.int64], NDArray[Any]]:
    try:
        vectors = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{key}.path={path} is not a readable .npy file: {error}") from error
    if vectors.ndim != 2 or not np.issubdtype(vectors.dtype, np.floating) or 0 in vectors.shape:
        raise ValueError(
            f"{key}.path={path}: expected a floating matrix whose row i is the vector of id i, "
            f"found {vectors.dtype} of shape {vectors.shape}"
        )
    return np.arange(len(vectors)), vectors


def _read_parquet(
    key: str, path: Path, config: VectorFileConfig
) -> tuple[NDArray[np.int64], NDArray[Any]]:
    columns = [config.id_column, config.vector_column]
    try:
        with pq.ParquetFile(path) as file:
            lacking = sorted(set(columns) - set(file.schema_arrow.names))
            if lacking:
                raise ValueError(
                    f"{key}.path={path} has no column(s) {lacking}; it has "
                    f"{file.schema_arrow.names}: name them in id_column and vector_column"
                )
            table = file.read(columns=columns).combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{key}.path={path} is not a readable Parquet file: {error}") from error
    ids, lists = (table[name].combine_chunks() for name in columns)
    is_text = pa.types.is_string(ids.type) or pa.types.is_large_string(ids.type)
    if ids.null_count or not (is_text or pa.types.is_integer(ids.type)):
        raise ValueError(
            f"{key}.path={path}: column {config.id_column} must hold integers or text without "
            f"nulls, found {ids.type} with {ids.null_count} nulls"
        )
    is_list = any(
        test(lists.type)
        for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    )
    widths = lists.value_lengths().unique() if is_list else []
    values = lists.flatten() if is_list else None
    if (
        values is None
        or lists.null_count
        or values.null_count
        or len(widths) != 1
        or widths[0].as_py() == 0
        or not pa.types.is_floating(values.type)
    ):
        raise ValueError(
            f"{key}.path={path}: column {config.vector_column} must hold lists of floating "
            f"numbers, all of one length and without nulls, found {lists.type} of lengths "
            f"{sorted(x.as_py() or 0 for x in widths)[:5]}"
        )
    # As gr sessionize makes ids of text.
    numbers = [string_id(x) for x in ids.to_pylist()] if is_text else ids.cast(pa.int64())
    vectors = values.to_numpy(zero_copy_only=False).reshape(len(ids), -1)
    return np.array(numbers, np.int64), vectors


def _digest(ids: NDArray[np.int64], vectors: NDArray[Any]) -> int:
    digest = hashlib.blake2b(ids.tobytes(), digest_size=8)
    digest.update(repr((vectors.shape, str(vectors.dtype))).encode())
    digest.update(vectors.data)
    return int.from_bytes(digest.digest(), "big", signed=True)
