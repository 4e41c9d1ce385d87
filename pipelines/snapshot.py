"""Histories of one partition as a file, so that a resumed run need not read the whole log again.

An Arrow IPC file, one row a user: user_id, total (events ever seen), and the newest `keep` events
as lists of encoded values. The metadata of the schema say where in the log they stand and which
configuration encoded them. Rows beyond `keep` can never be read, so what a store holds of them is
left out: the batches after a restore are those of a run that was not interrupted, bit for bit.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.config import DataConfig
from pipelines.history import EventRows, HistoryStore, event_widths
from pipelines.prefetch import prefetch

FORMAT = "gr histories 1"
_KEY = b"gr"
# Events of a record batch: buffers of a few MB stay in the cache and are used again, which is
# several times faster than packing everything into fresh memory first.
_EVENTS_PER_BATCH = 1 << 16
_USERS_PER_BATCH = 1 << 15
# The disk works while the next bytes are packed, not only in the last fsync.
_BYTES_PER_SYNC = 1 << 26

_SCHEMA = pa.schema(
    {
        "user_id": pa.int64(),
        "total": pa.int32(),
        "ints": pa.list_(pa.int64()),
        "floats": pa.list_(pa.float32()),
        "codes": pa.list_(pa.uint8()),
    }
)


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a partition stands in the log, and what its histories are made with."""

    partition: int
    rows: int
    """Sessions consumed."""
    rejected: dict[str, int]
    """Reason -> sessions skipped so far."""
    encoding: str
    """`encoding_of` the configuration."""
    log: tuple[str, ...]
    """Checksums of the files read so far, the one that is being read included."""


def encoding_of(config: DataConfig) -> str:
    """Return a hash of all settings that shape the rows of a history."""
    keys: tuple[str, ...] = (
        *("layout", "supervise", "max_history_tokens", "overlap_slack"),
        *("actions", "item_features", "dense_features", "tasks", "positive"),
    )
    if any(feature.is_counter for feature in config.item_features.values()):
        keys += ("anchor", "max_session_events")
    values = {key: getattr(config, key) for key in keys}
    text = json.dumps(values, default=asdict, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def snapshot_name(partition: int) -> str:
    """Return the file name of a partition's histories."""
    return f"histories-{partition:05d}.arrow"


def write_snapshot(path: Path, store: HistoryStore, standing: Standing) -> None:
    """Write the histories of a partition; the file is there whole and on the disk, or not at all.

    Args:
        path: file; its folder exists.
        store: histories.
        standing: where they stand.
    """
    write_checked(path, _SCHEMA, standing, _batches(store))


def write_checked(
    path: Path, schema: pa.Schema, standing: Standing, batches: Iterator[pa.RecordBatch]
) -> None:
    """Write batches with their checksums; the file is there whole and on the disk, or not at all.

    Args:
        path: file; its folder exists.
        schema: of the batches.
        standing: where what they hold stands.
        batches: made in a thread; the memory of one may be used again three batches later.
    """
    draft = path.with_name(f".{path.name}.tmp")
    schema = schema.with_metadata({_KEY: json.dumps({"format": FORMAT, **asdict(standing)})})
    with pa.OSFile(str(draft), "wb") as file, _synced(draft) as sync:
        with pa.ipc.new_file(file, schema) as writer:
            for batch, checksum in prefetch(_checked(batches), 1):
                writer.write_batch(batch, custom_metadata={_KEY: checksum})
                sync(file.tell())
        file.flush()
    draft.replace(path)


def read_snapshot(path: Path, store: HistoryStore, expected: Standing) -> dict[str, int]:
    """Restore the histories of a partition into an empty store.

    Args:
        path: what `write_snapshot` wrote.
        store: filled.
        expected: where the histories should stand; `rejected` is not compared.

    Returns:
        Reason -> sessions skipped before.

    Raises:
        ValueError: if the file is missing or damaged, or its histories stand elsewhere or are made
            with another configuration.
    """
    with read_checked(path, expected) as (rejected, batches):
        ints, floats, codes = event_widths(store.rules)
        store.reserve(path.stat().st_size // (8 * ints + 4 * floats + codes))
        for batch in batches:
            _restore(batch, store)
    return rejected


@contextmanager
def read_checked(
    path: Path, expected: Standing
) -> Iterator[tuple[dict[str, int], Iterator[pa.RecordBatch]]]:
    """Yield reason -> sessions skipped before, and the batches that `write_checked` wrote.

    Args:
        path: the file.
        expected: where what it holds should stand; `rejected` is not compared.

    Raises:
        ValueError: if the file is missing or damaged, or stands elsewhere.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing: {_INSTEAD}")
    with (
        _explain_damage(path),
        pa.memory_map(str(path)) as source,
        pa.ipc.open_file(source) as file,
    ):
        found = json.loads((file.schema.metadata or {}).get(_KEY, b"{}"))
        _check(path, found, expected)
        yield found["rejected"], prefetch(_read(path, file), 2)


_INSTEAD = (
    "restore it from a copy, resume from an older checkpoint, or remove the folder of histories "
    "from the checkpoint to have them made anew from the log"
)


def _check(path: Path, found: dict[str, Any], expected: Standing) -> None:
    if found.get("format") != FORMAT:
        raise ValueError(
            f"{path}: expected format {FORMAT!r}, found {found.get('format')!r}: {_INSTEAD}"
        )
    for key, wanted in asdict(expected).items():
        if key == "rejected":
            continue
        there = tuple(found[key]) if isinstance(wanted, tuple) else found[key]
        if there != wanted:
            raise ValueError(
                f"{path}: its histories have {key} {there!r}, expected {wanted!r}. Resume with the "
                "log and the data settings of the checkpoint, or remove the folder of histories "
                "from the checkpoint to have them made anew from the log."
            )


@contextmanager
def _synced(path: Path) -> Iterator[Callable[[int], None]]:
    """Yield what sends a file to the disk while it is written; at the end all of it is there.

    The yielded function takes the bytes written so far.
    """
    handle, sent = os.open(path, os.O_RDONLY), 0

    def sync(size: int) -> None:
        nonlocal sent
        if size - sent >= _BYTES_PER_SYNC:
            sent = size
            syncing.append(pool.submit(os.fdatasync, handle))

    syncing: list[Future[None]] = []
    try:
        with ThreadPoolExecutor(1) as pool:
            yield sync
        for done in syncing:
            done.result()
        os.fsync(handle)
    finally:
        os.close(handle)


def _checked(
    batches: Iterator[pa.RecordBatch],
) -> Generator[tuple[pa.RecordBatch, bytes], None, None]:
    """Yield batches with their checksums."""
    for batch in batches:
        yield batch, _checksum(batch)


def _read(path: Path, file: pa.ipc.RecordBatchFileReader) -> Generator[pa.RecordBatch, None, None]:
    """Yield the batches of a file whose checksums are right.

    Raises:
        ValueError: at the first whose checksum is not.
    """
    for i in range(file.num_record_batches):
        batch, metadata = file.get_batch_with_custom_metadata(i)
        if metadata is None or metadata.get(_KEY) != _checksum(batch):
            raise ValueError(f"{path} is damaged in batch {i}: {_INSTEAD}")
        yield batch


def _batches(store: HistoryStore) -> Iterator[pa.RecordBatch]:
    """Yield all histories; the memory of a batch is used again three batches later."""
    num_users, widths = store.num_users, event_widths(store.rules)
    room = max(_EVENTS_PER_BATCH, store.rules.keep)
    turns = [
        (
            EventRows(
                np.empty(room * widths[0], np.int64),
                np.empty(room * widths[1], np.float32),
                np.empty(room * widths[2], np.uint8),
            ),
            np.zeros(_USERS_PER_BATCH + 1, np.int32),
        )
        for _ in range(3)  # one is packed, one waits, one is written
    ]
    first = 0
    for buffers, offsets in cycle(turns):
        if first == num_users:
            return
        last = store.pack(first, buffers, offsets)
        bounds = offsets[: last - first + 1]
        columns = [pa.array(store.arena.user_id[first:last])]
        columns.append(pa.array(store.arena.total[first:last]))
        filled: tuple[NDArray[Any], ...] = buffers
        for values, width in zip(filled, widths, strict=True):
            flat = pa.array(values[: int(bounds[-1]) * width])
            columns.append(pa.ListArray.from_arrays(pa.array(bounds * np.int32(width)), flat))
        yield pa.record_batch(columns, schema=_SCHEMA)
        first = last


def _restore(batch: pa.RecordBatch, store: HistoryStore) -> None:
    columns = [batch.column(name) for name in ("ints", "floats", "codes")]
    lengths = np.diff(column_values(columns[-1].offsets)) // store.rules.num_codes
    events = EventRows(*(column_values(column.flatten()) for column in columns))
    sizes = [int(lengths.sum()) * width for width in event_widths(store.rules)]
    if [len(values) for values in events] != sizes or lengths.max(initial=0) > store.rules.keep:
        raise pa.ArrowInvalid("its lists do not have the sizes of the configuration's events")
    store.restore(
        column_values(batch.column("user_id")),
        column_values(batch.column("total")),
        lengths,
        events,
    )


def column_values(column: pa.Array) -> NDArray:
    """Return the values of a column without nulls, in its own memory."""
    return np.asarray(column.to_numpy(zero_copy_only=True))


def _checksum(batch: pa.RecordBatch) -> bytes:
    """Return a sum over all buffers of a batch: a flipped bit must not become a history."""
    total = 0
    for column in batch.columns:
        values = column.flatten() if isinstance(column, pa.ListArray) else column
        parts = [values] if values is column else [column.offsets, values]
        for part in parts:
            total = zlib.crc32(memoryview(part.to_numpy(zero_copy_only=True)).cast("B"), total)
    return str(total).encode()


@contextmanager
def _explain_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}): {_INSTEAD}") from error
