"""Parquet with the columns of an event log, or the publisher's own, a batch at a time."""

from collections.abc import Iterator
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.datasets.description import Dataset
from pipelines.datasets.rejected import Rejected

BATCH_ROWS = 1 << 18


def read_parquet(
    dataset: Dataset, name: str, file: IO[bytes], rejected: Rejected, *, plain: bool
) -> Iterator[pa.Table]:
    """Yield the rows of a Parquet file in order.

    Args:
        dataset: whose columns.
        name: of the file, for messages.
        file: binary, can seek.
        rejected: rows without a required value go there.
        plain: the file has the columns of the event log (those that it lacks become null, except
            user, item and time), not the publisher's.

    Raises:
        ValueError: if the file cannot be read, lacks a column, or a column has another type.
    """
    try:
        parquet = pq.ParquetFile(file)
        _check(dataset, name, parquet.schema_arrow, plain)
        if plain or dataset.batches is None:
            there = [x for x in dataset.schema.names if x in parquet.schema_arrow.names]
            batches = parquet.iter_batches(BATCH_ROWS, columns=there)
        else:
            batches = dataset.batches(parquet)
        required = {x.name: x.source for x in dataset.columns if x.required}
        if plain:
            required = {x: x for x in _keys(dataset)}
        row = 0
        for batch in batches:
            yield _usable(batch, dataset, required, name, row, rejected)
            row += batch.num_rows
    # ArrowNotImplementedError: Arrow cannot read an encoding or a type that the file has.
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise ValueError(f"{name} cannot be read as {dataset.name}: {error}") from error


def _keys(dataset: Dataset) -> list[str]:
    """Return the columns that every event log of the dataset has."""
    return ["user_id", "item_id", dataset.sessionize.get("timestamp", "timestamp")]


def _check(dataset: Dataset, name: str, schema: pa.Schema, plain: bool) -> None:
    """Refuse a file without the columns that are needed."""
    needed = [x.name if plain else x.source for x in dataset.columns]
    if plain:
        needed = _keys(dataset)
    missing = sorted(set(needed) - set(schema.names))
    if missing:
        raise ValueError(f"{name} has no column {missing}; it has {schema.names}")


def _usable(
    batch: pa.RecordBatch,
    dataset: Dataset,
    required: dict[str, str],
    name: str,
    first_row: int,
    rejected: Rejected,
) -> pa.Table:
    """Return the rows that have what is required, columns that the file lacks as nulls."""
    table = pa.Table.from_batches([batch])
    good = pa.array(np.ones(table.num_rows, bool))
    for column, source in required.items():
        null = pc.and_(good, pc.is_null(table[column]))
        for row in pc.indices_nonzero(null).to_pylist():
            text = str(table.slice(row, 1).to_pylist()[0])
            rejected.add(f"{source} is null or unknown", name, first_row + row, text)
        good = pc.and_not(good, null)
    columns = {
        field.name: table[field.name].cast(field.type)
        if field.name in table.column_names
        else pa.nulls(table.num_rows, field.type)
        for field in dataset.schema
    }
    return pa.table(columns).filter(good)
