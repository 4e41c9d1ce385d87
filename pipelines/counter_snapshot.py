"""Decayed counters of one partition as a file beside its histories (pipelines/snapshot.py)."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.decayed_counters import NUM_KEYS, CounterStore
from pipelines.snapshot import Standing, column_values, read_checked, write_checked

_KEYS_PER_BATCH = 1 << 15

_SCHEMA = pa.schema(
    {
        "kind": pa.int64(),
        "key": pa.int64(),
        "base_time": pa.int64(),
        "values": pa.list_(pa.float64()),
        "times": pa.list_(pa.int64()),
        "weights": pa.list_(pa.float64()),
    }
)


def counters_name(partition: int) -> str:
    """Return the file name of a partition's counters."""
    return f"counters-{partition:05d}.arrow"


def write_counters(path: Path, stores: Sequence[CounterStore], standing: Standing) -> None:
    """Write the counters of a partition; the file is there whole and on the disk, or not at all.

    Args:
        path: file; its folder exists.
        stores: of each kind of key.
        standing: where they stand.
    """
    write_checked(path, _SCHEMA, standing, _batches(stores))


def read_counters(path: Path, stores: Sequence[CounterStore], expected: Standing) -> None:
    """Restore the counters of a partition into empty stores.

    Args:
        path: what `write_counters` wrote.
        stores: of the same kinds of key; filled.
        expected: where the counters should stand; `rejected` is not compared.

    Raises:
        ValueError: if the file is missing or damaged, or its counters stand elsewhere or are made
            with another configuration.
    """
    of_kind = {store.rules.kind: store for store in stores}
    with read_checked(path, expected) as (_, batches):
        for batch in batches:
            values, times, weights = (batch.column(x) for x in ("values", "times", "weights"))
            of_kind[batch.column("kind")[0].as_py()].restore(
                column_values(batch.column("key")),
                column_values(batch.column("base_time")),
                column_values(values.flatten()),
                np.diff(column_values(times.offsets)).astype(np.int64),
                column_values(times.flatten()),
                column_values(weights.flatten()),
            )


def _batches(stores: Sequence[CounterStore]) -> Iterator[pa.RecordBatch]:
    for store in stores:
        num_keys = int(store.table.state[NUM_KEYS])
        for first in range(0, num_keys, _KEYS_PER_BATCH):
            last = min(first + _KEYS_PER_BATCH, num_keys)
            key, base_time, values, counts, times, weights = store.rows(first, last)
            every = np.ones(last - first, np.int64)
            yield pa.record_batch(
                [
                    pa.array(store.rules.kind * every),
                    pa.array(key),
                    pa.array(base_time),
                    _lists(values, every * len(store.rules.columns)),
                    _lists(times, counts),
                    _lists(weights, counts * len(store.rules.signals)),
                ],
                schema=_SCHEMA,
            )


def _lists(values: np.ndarray, counts: np.ndarray) -> pa.ListArray:
    offsets = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
