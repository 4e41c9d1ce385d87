"""Reads a partition of the session-end log as blocks of checked, encoded sessions."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.features import Column, EventEncoder, feature_ids, integers
from pipelines.history import EventRows, Ints, SessionRows
from pipelines.schema import (
    CONTEXT,
    END_TS,
    EVENT_ITEM_ID,
    EVENT_TIMESTAMP,
    EVENTS,
    SESSION_ID,
    START_TS,
    USER_ID,
)

END_OF_TIME = 253_402_300_800  # 1 January 10000 UTC; milliseconds taken for seconds lie beyond

Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive sessions of a partition."""

    path: Path
    first_row: int
    """Row of the file."""
    sessions: SessionRows
    events: EventRows

    @property
    def num_sessions(self) -> int:
        """Sessions, rejected ones included."""
        return len(self.sessions.user_id)


def read_blocks(path: Path, encoder: EventEncoder, *, rows_per_block: int) -> Iterator[Block]:
    """Yield the sessions of a file in order, decoding only the columns that `encoder` needs.

    Raises:
        ValueError: if the file cannot be read, lacks a column, or a column has another type.
    """
    with open_parquet(path) as file:
        paths = _leaf_paths(file, encoder.columns, path)
        first_row = 0
        batches = file.iter_batches(rows_per_block, columns=paths, use_threads=False)
        while True:
            with explain_corruption(path):
                batch = next(batches, None)
            if batch is None:
                return
            yield _decode(batch, encoder, path, first_row)
            first_row += batch.num_rows


def read_end_ts(path: Path) -> Ints:
    """Return (n,) int64 s: end_ts of each session; a null repeats the one before it.

    Raises:
        ValueError: if the file cannot be read or its rows are not ordered by end_ts.
    """
    with open_parquet(path) as file, explain_corruption(path):
        column = file.read(columns=[END_TS], use_threads=False)[END_TS].combine_chunks()
    if column.null_count:
        column = pc.fill_null_forward(column).fill_null(0)
    end_ts = integers(column)
    wrong = np.flatnonzero(end_ts[1:] < end_ts[:-1])
    if len(wrong):
        row = int(wrong[0]) + 1
        raise ValueError(
            f"{path}: sessions must be ordered by end_ts, but row {row} ends at {end_ts[row]} and "
            f"row {row - 1} at {end_ts[row - 1]}. Write the log with gr sessionize, or sort each "
            "partition."
        )
    return end_ts


def check_columns(path: Path, columns: Iterable[Column]) -> None:
    """Check that a file of sessions has the columns that the configuration needs.

    Raises:
        ValueError: if it cannot be read, lacks a column, or a column has another type.
    """
    with open_parquet(path) as file:
        _leaf_paths(file, columns, path)


@contextmanager
def open_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file.

    Raises:
        ValueError: if it is missing or not Parquet.
    """
    if not path.is_file():
        raise ValueError(
            f"{path} is missing, though the log's manifest names it: run gr sessionize again"
        )
    with explain_corruption(path):
        file = pq.ParquetFile(path, memory_map=True)
    with file:
        yield file


@contextmanager
def explain_corruption(path: Path) -> Iterator[None]:
    """Turn what Arrow raises about a damaged file into a ValueError that names it."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is not a readable Parquet file ({error}): run gr sessionize again"
        ) from error


def _leaf_paths(file: pq.ParquetFile, wanted: Iterable[Column], path: Path) -> list[str]:
    """Return the Parquet paths of the columns, after a check that they are what is needed."""
    schema = file.schema_arrow
    for name in (USER_ID, SESSION_ID, START_TS, END_TS):
        if name not in schema.names or not pa.types.is_integer(schema.field(name).type):
            raise ValueError(
                f"{path}: expected an integer column {name!r} as in a session-end log, found "
                f"{schema.names}. Write the log with gr sessionize."
            )
    events = schema.field(EVENTS).type if EVENTS in schema.names else None
    if events is None or not (
        (pa.types.is_list(events) or pa.types.is_large_list(events))
        and pa.types.is_struct(events.value_type)
    ):
        raise ValueError(
            f"{path}: expected a column {EVENTS!r} of type list<struct>, found {events}. Write the "
            "log with gr sessionize."
        )
    context = schema.field(CONTEXT).type if CONTEXT in schema.names else pa.struct([])
    places = {
        "events": {field.name: field.type for field in events.value_type},
        "context": {field.name: field.type for field in context},
        "session": {field.name: field.type for field in schema},
    }
    needed: set[tuple[str, ...]] = {(name,) for name in (USER_ID, SESSION_ID, START_TS, END_TS)}
    for column in wanted:
        there = places[column.place]
        if column.name not in there:
            raise ValueError(
                f"{column.wanted_by} needs the column {column.name!r}, which {path} does not have "
                f"among its {column.place} columns {sorted(there)}. Correct the name, or add the "
                "column with gr sessionize."
            )
        _check_type(column, there[column.name], path)
        needed.add((column.name,) if column.place == "session" else (column.place, column.name))
    return [leaf for leaf in _parquet_leaves(file) if _column_of(leaf) in needed]


def _check_type(column: Column, found: pa.DataType, path: Path) -> None:
    numeric = pa.types.is_integer(found) or pa.types.is_boolean(found)
    if column.kind == "number":
        numeric = numeric or pa.types.is_floating(found)
    if not numeric:
        expected = "an integer or bool" if column.kind == "integer" else "a number or bool"
        fix = "give it boundaries" if pa.types.is_floating(found) else "take another column"
        raise ValueError(
            f"{column.wanted_by}: {column.place} column {column.name!r} must be {expected} column, "
            f"found {found} in {path}. Correct the configuration: {fix}."
        )


def _parquet_leaves(file: pq.ParquetFile) -> list[str]:
    return [file.schema.column(i).path for i in range(len(file.schema))]


def _column_of(leaf: str) -> tuple[str, ...]:
    """Return what a Parquet path stands for: (name,), (context, name) or (events, name)."""
    top, _, rest = leaf.partition(".")
    if top == EVENTS:
        return (top, rest.split(".", 2)[-1])  # events.list.element.NAME
    return (top, rest) if top == CONTEXT else (leaf,)


def _decode(batch: pa.RecordBatch, encoder: EventEncoder, path: Path, first_row: int) -> Block:
    lists = batch.column(EVENTS)
    lengths = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    offsets = np.zeros(batch.num_rows + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    # flatten() knows of slices and of the validity of parents; the children themselves do not.
    structs = lists.flatten()
    columns = dict(zip((f.name for f in structs.type), structs.flatten(), strict=True))

    item_id = integers(columns[EVENT_ITEM_ID])
    events = encoder.encode(columns, item_id)
    sessions = SessionRows(
        user_id=_owned(integers(batch.column(USER_ID))),
        session_id=_owned(integers(batch.column(SESSION_ID))),
        start_ts=_owned(integers(batch.column(START_TS))),
        offsets=offsets,
        reason=_reasons(batch, columns, offsets, events, encoder),
        context=_context_ids(batch, encoder),
    )
    return Block(path, first_row, sessions, events)


def _owned(values: Ints) -> Ints:
    """Copy what may lie in Arrow's read-only memory: the kernels take writable arrays."""
    return np.array(values, np.int64)


def _context_ids(batch: pa.RecordBatch, encoder: EventEncoder) -> Ints:
    features = encoder.config.context_features
    columns: dict[str, pa.Array] = {USER_ID: batch.column(USER_ID)}
    if CONTEXT in batch.schema.names:
        context = batch.column(CONTEXT)
        columns |= dict(zip((f.name for f in context.type), context.flatten(), strict=True))
    ids = np.empty((batch.num_rows, len(features)), np.int64)
    for i, (name, feature) in enumerate(features.items()):
        ids[:, i] = feature_ids(columns[feature.column or name], feature)
    return ids


def _reasons(
    batch: pa.RecordBatch,
    columns: dict[str, pa.Array],
    offsets: Ints,
    events: EventRows,
    encoder: EventEncoder,
) -> NDArray[np.uint8]:
    """Return for each session 0, or why it cannot be used (pipelines.rejects.REASONS)."""
    start_ts, end_ts = integers(batch.column(START_TS)), integers(batch.column(END_TS))
    ints = events.ints.reshape(-1, encoder.num_ints)
    item_id, timestamp = ints[:, 0], ints[:, 1]
    session = np.repeat(np.arange(batch.num_rows), np.diff(offsets))

    def any_event(flags: Any) -> Flags:
        return np.bincount(session[flags], minlength=batch.num_rows) > 0

    def absurd(times: Ints) -> Flags:
        return (times < 0) | (times >= END_OF_TIME)

    null_key = np.zeros(batch.num_rows, bool)
    for name in (USER_ID, SESSION_ID, START_TS, END_TS):
        null_key |= _is_null(batch.column(name))
    descends = np.zeros(len(timestamp), bool)
    descends[1:] = (timestamp[1:] < timestamp[:-1]) & (session[1:] == session[:-1])
    outside = (timestamp < start_ts[session]) | (timestamp > end_ts[session])
    infinite = np.isinf(events.floats.reshape(len(timestamp), encoder.num_floats)).any(axis=1)
    tests = (
        null_key,
        np.diff(offsets) == 0,
        any_event(_is_null(columns[EVENT_ITEM_ID]) | _is_null(columns[EVENT_TIMESTAMP])),
        any_event(item_id < 0),
        any_event(absurd(timestamp)) | absurd(start_ts) | absurd(end_ts),
        any_event(descends),
        any_event(outside),
        any_event(infinite),
    )
    reason = np.zeros(batch.num_rows, np.uint8)
    for code, failed in reversed(list(enumerate(tests, start=1))):
        reason[failed] = code
    return reason


def _is_null(values: pa.Array) -> Flags:
    if not values.null_count:
        return np.zeros(len(values), bool)
    return np.asarray(values.is_null().to_numpy(zero_copy_only=False))
