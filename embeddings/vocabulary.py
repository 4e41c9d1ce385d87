"""Raw ids to rows of the tables. Runs on the CPU, in the thread that prepares batches."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.config import EmbeddingsConfig, TableConfig
from embeddings.hashing import hash_ids

UNKNOWN_ID = -1
"""Raw id of what is not known; row 0 of every table."""


class Vocabulary:
    """Maps the raw ids of each feature to rows of the table that serves it.

    Row 0 is for the unknown id, -1. static: row = id + 1; hashed: row = 1 + hash_ids(id) %
    (num_embeddings - 1). dynamic: ids stay as they are, for embeddings/dynamic.py to map.

    Args:
        config: the tables.
    """

    def __init__(self, config: EmbeddingsConfig) -> None:
        self.config = config
        self._table_of = {f: name for name, table in config.tables.items() for f in table.features}

    def rows(self, ids: KeyedJaggedTensor, partition: Tensor | None = None) -> KeyedJaggedTensor:
        """Return `ids` with rows in the place of raw ids; keys and lengths stay as they are.

        Args:
            ids: raw ids by feature, int64, on the CPU.
            partition: (B,) int64, partition of the log that each sequence came from, so that an
                error can name it.

        Raises:
            ValueError: if no table serves a feature, or an id is outside a static table.
        """
        bounds = ids.offset_per_key()
        values = ids.values()
        rows = torch.empty_like(values)
        for i, feature in enumerate(ids.keys()):
            if feature not in self._table_of:
                raise ValueError(
                    f"no embedding table serves feature {feature!r}: add it to "
                    "embeddings.tables.NAME.features"
                )
            name = self._table_of[feature]
            table = self.config.tables[name]
            feature_ids = values[bounds[i] : bounds[i + 1]]
            if table.ids == "static":
                outside = _outside(feature_ids, table)
                if outside.numel():
                    # Position of the first bad id among the values of the feature -> its sequence.
                    ends = ids.lengths().view(len(ids.keys()), -1)[i].cumsum(0)
                    sequence = int(torch.searchsorted(ends, outside[0], right=True))
                    where = f"sequence {sequence} of the batch"
                    if partition is not None:
                        where += f", partition {int(partition[sequence])}"
                    raise _out_of_range(
                        name, table, f"feature {feature!r}", feature_ids[outside], where
                    )
            rows[bounds[i] : bounds[i + 1]] = _to_rows(feature_ids, table)
        # offset_per_key() above is kept in `ids`; handing it on spares the device a wait at lookup.
        return KeyedJaggedTensor(
            keys=ids.keys(),
            values=rows,
            lengths=ids.lengths(),
            stride=ids.stride(),
            offset_per_key=bounds,
        )

    def row_of(self, table: str, ids: Tensor) -> Tensor:
        """Return the row of each id, (n,) int64.

        Args:
            table: name of the table.
            ids: (n,) int64 raw ids.

        Raises:
            ValueError: if there is no such table, its ids are dynamic, or an id is outside a static
                table.
        """
        config = self._table(table)
        if config.ids == "dynamic":
            raise ValueError(
                f"table {table!r} has ids=dynamic, whose rows change as batches come: ask "
                "DynamicVocabulary"
            )
        if config.ids == "static":
            outside = _outside(ids, config)
            if outside.numel():
                raise _out_of_range(table, config, "the given ids", ids[outside], "")
        return _to_rows(ids, config)

    def rows_of_few(self, table: str, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return what `row_of` does, of numpy: operators of torch take longer than a few ids do.

        Raises:
            ValueError: as `row_of`.
        """
        config = self._table(table)
        last = config.num_embeddings - 2
        if config.ids == "static" and len(ids) and UNKNOWN_ID <= ids.min() <= ids.max() <= last:
            return ids + 1
        found: NDArray[np.int64] = self.row_of(table, torch.from_numpy(ids)).numpy()
        return found

    def id_of(self, table: str, rows: Tensor) -> Tensor:
        """Return the raw id of each row of a static table, (n,) int64; row 0 gives -1.

        Raises:
            ValueError: if the table is not static: a hash has no inverse.
        """
        self._static(table)
        return rows - 1

    def catalogue_size(self, table: str) -> int:
        """Return how many ids a static table has: they are 0 .. size - 1, in rows 1 .. size.

        Raises:
            ValueError: if the table is not static.
        """
        return self._static(table).num_embeddings - 1

    def _table(self, table: str) -> TableConfig:
        if table not in self.config.tables:
            raise ValueError(f"expected a table of {sorted(self.config.tables)}, got {table!r}")
        return self.config.tables[table]

    def _static(self, table: str) -> TableConfig:
        config = self._table(table)
        if config.ids != "static":
            raise ValueError(
                f"table {table!r} has ids={config.ids}, whose rows do not tell their ids; a "
                f"catalogue needs embeddings.tables.{table}.ids=static"
            )
        return config


def _to_rows(ids: Tensor, table: TableConfig) -> Tensor:
    if table.ids == "dynamic":
        return ids
    if table.ids == "static":
        return ids + 1
    return torch.where(ids == UNKNOWN_ID, 0, 1 + hash_ids(ids) % (table.num_embeddings - 1))


def _outside(ids: Tensor, table: TableConfig) -> Tensor:
    """Return the positions of the ids that the static table has no row for."""
    if not ids.numel():
        return ids
    least, most = ids.aminmax()
    if int(least) >= UNKNOWN_ID and int(most) <= table.num_embeddings - 2:
        return ids[:0]
    bad = (ids < UNKNOWN_ID) | (ids > table.num_embeddings - 2)
    return bad.nonzero().squeeze(1)


def _out_of_range(
    name: str, table: TableConfig, what: str, bad_ids: Tensor, where: str
) -> ValueError:
    place = f" ({where})" if where else ""
    return ValueError(
        f"table {name!r}, {what}: expected ids in 0 .. {table.num_embeddings - 2} (-1: unknown), "
        f"got {int(bad_ids[0])}{place}; {bad_ids.numel()} id(s) in all are outside. Correct the "
        f"log, raise embeddings.tables.{name}.num_embeddings (largest id + 2), or set "
        f"embeddings.tables.{name}.ids=hashed"
    )
