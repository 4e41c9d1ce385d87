"""Reads a partition of the session-end log as blocks of checked, encoded sessions."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.feature_columns import UNKNOWN_ID, Flags, Floats, integers, read_numbers
from pipelines.features import Column, EventEncoder
from pipelines.history import EventRows, Ints, SessionRows
from pipelines.location import Location, open_input
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

NO_TIME = -1
END_OF_TIME = 253_402_300_800  # 1 January 10000 UTC; milliseconds taken for seconds lie beyond

UNREADABLE = 9  # code of SessionRows.reason (pipelines.rejects.REASONS)
DISORDERED = 10


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive sessions of a partition."""

    path: Location
    first_row: int
    """Row of the file."""
    sessions: SessionRows
    events: EventRows
    file_rows: Ints | None = None
    """(n,) int64: row of the file of each; None: first_row, first_row + 1, ..."""
    signals: NDArray[np.float64] | None = None
    """(E, *) float64: what counters sum (pipelines.decayed_counters); None without counters."""
    frontier: Ints | None = None
    """(n,) int64 s: of each session, as counters need it; None without counters."""

    @property
    def num_sessions(self) -> int:
        """Sessions, rejected ones included; slices count as sessions (pipelines.long_sessions)."""
        return len(self.sessions.user_id)

    def row_of(self, session: int) -> int:
        """Return the row of the file that a session lies in."""
        return self.first_row + session if self.file_rows is None else int(self.file_rows[session])


def read_blocks(
    path: Location,
    encoder: EventEncoder,
    *,
    rows_per_block: int,
    first_row: int = 0,
    num_rows: int | None = None,
) -> Iterator[Block]:
    """Yield the sessions of a file in order, decoding only the columns that `encoder` needs.

    What of a row group cannot be read comes as sessions whose reason is UNREADABLE.

    Args:
        path: Parquet file of sessions.
        encoder: names the columns, encodes the events.
        rows_per_block: most sessions of a block.
        first_row: row to start with; row groups before it are not read.
        num_rows: of the file as it was found before: if it cannot be opened any more, all of them
            come as unreadable. None: that is an error.

    Raises:
        ValueError: if the file cannot be opened, lacks a column, or a column has another type.
    """
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open_parquet(path))
        except ValueError:
            if num_rows is None:
                raise
            yield _unreadable(path, first_row, num_rows - first_row, encoder)
            return
        paths = _leaf_paths(file, encoder.columns, path)
        begin = 0
        for group in range(file.num_row_groups):
            end = begin + file.metadata.row_group(group).num_rows
            row = begin
            batches = file.iter_batches(
                rows_per_block, row_groups=[group], columns=paths, use_threads=False
            )
            while row < end and end > first_row:
                try:
                    batch = next(batches, None)
                    block = batch and _decode(batch, encoder, path, row)
                except (pa.ArrowException, OSError):
                    block = None
                if block is None:  # damaged, or fewer rows than the footer says
                    block = _unreadable(path, row, end - row, encoder)
                row += block.num_sessions
                if row > first_row:
                    yield _from_row(block, first_row)
            begin = end


def read_end_ts(path: Location) -> Ints:
    """Return (n,) int64 s: end_ts of each session; NO_TIME where it is null or cannot be read.

    Raises:
        ValueError: if the file cannot be opened.
    """
    return read_times(path, END_TS)


def read_times(path: Location, name: str) -> Ints:
    """Return (n,) int64 s: a time of each session; NO_TIME where it is null or cannot be read.

    Raises:
        ValueError: if the file cannot be opened.
    """
    parts = [np.empty(0, np.int64)]
    with open_parquet(path) as file:
        for group in range(file.num_row_groups):
            try:
                column = file.read_row_group(group, columns=[name], use_threads=False)[name]
                values = integers(column.combine_chunks())
                parts.append(np.where(is_absurd(values), NO_TIME, values))
            except (pa.ArrowException, OSError):
                parts.append(np.full(file.metadata.row_group(group).num_rows, NO_TIME))
    return np.concatenate(parts)


def is_absurd(times: Ints) -> Flags:
    """Return where a time in s lies before 1970 or after 9999."""
    return (times < 0) | (times >= END_OF_TIME)


def check_columns(path: Location, columns: Iterable[Column]) -> None:
    """Check that a file of sessions has the columns that the configuration needs.

    Raises:
        ValueError: if it cannot be read, lacks a column, or a column has another type.
    """
    with open_parquet(path) as file:
        _leaf_paths(file, columns, path)


@contextmanager
def open_parquet(path: Location) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file.

    Raises:
        ValueError: if it is missing or not Parquet.
    """
    with explain_corruption(path):
        is_there = path.is_file()
    if not is_there:
        raise ValueError(
            f"{path} is missing, though the log's manifest names it: run gr sessionize again"
        )
    with explain_corruption(path):
        source = open_input(path)
        file = pq.ParquetFile(
            source,
            page_checksum_verification=True,
            pre_buffer=not isinstance(path, Path),  # few large requests instead of many small ones
        )
    with source, file:
        yield file


@contextmanager
def explain_corruption(path: Location) -> Iterator[None]:
    """Turn what Arrow raises about a damaged file into a ValueError that names it."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is not a readable Parquet file ({error}): run gr sessionize again"
        ) from error


def _leaf_paths(file: pq.ParquetFile, wanted: Iterable[Column], path: Location) -> list[str]:
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
    return [leaf for leaf in _parquet_leaves(file) if needed & _columns_of(leaf)]


def _check_type(column: Column, found: pa.DataType, path: Location) -> None:
    is_list = any(
        test(found)
        for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    )
    value = found.value_type if is_list else found
    numeric = pa.types.is_integer(value) or pa.types.is_boolean(value)
    if column.kind in ("number", "numbers"):
        numeric = numeric or pa.types.is_floating(value)
    if numeric and is_list == column.kind.endswith("s"):
        return
    expected = {
        "integer": "an integer or bool",
        "number": "a number or bool",
        "integers": "a list-of-integers",
        "numbers": "a list-of-numbers",
    }[column.kind]
    if is_list != column.kind.endswith("s"):
        fix = "set max_values to how many values to keep" if is_list else "leave max_values out"
    elif pa.types.is_floating(value):
        fix = "give it boundaries, or encoding=zscore or quantile"
    else:
        fix = "take another column"
    raise ValueError(
        f"{column.wanted_by}: {column.place} column {column.name!r} must be {expected} column, "
        f"found {found} in {path}. Correct the configuration: {fix}."
    )


def _parquet_leaves(file: pq.ParquetFile) -> list[str]:
    return [file.schema.column(i).path for i in range(len(file.schema))]


def _columns_of(leaf: str) -> set[tuple[str, ...]]:
    """Return what a Parquet path may stand for: (name,), (context, name) or (events, name).

    A list ends in .list.element, and a name may have dots of its own.
    """
    top, _, rest = leaf.partition(".")
    if top not in (EVENTS, CONTEXT):
        return {(leaf,)}
    if top == EVENTS:
        rest = rest.split(".", 2)[-1]  # events.list.element.NAME
    return {(top, rest), (top, rest.rsplit(".", 2)[0])}


def _decode(batch: pa.RecordBatch, encoder: EventEncoder, path: Location, first_row: int) -> Block:
    lists = batch.column(EVENTS)
    lengths = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    offsets = np.zeros(batch.num_rows + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    # flatten() knows of slices and of the validity of parents; the children themselves do not.
    structs = lists.flatten()
    columns = dict(zip((f.name for f in structs.type), structs.flatten(), strict=True))

    item_id = integers(columns[EVENT_ITEM_ID])
    context = encoder.encode_context(_context_columns(batch), batch.num_rows)
    events = encoder.encode(columns, item_id, context, offsets)
    signals = encoder.counter_signals(columns, len(item_id))
    sessions = SessionRows(
        user_id=_owned(integers(batch.column(USER_ID))),
        session_id=_owned(integers(batch.column(SESSION_ID))),
        start_ts=_owned(integers(batch.column(START_TS))),
        offsets=offsets,
        reason=_reasons(batch, columns, offsets, events, context, signals, encoder),
        context=context,
        first_piece=np.zeros(batch.num_rows, np.int64),
    )
    if signals is not None:
        np.nan_to_num(signals, copy=False, nan=0.0)
    return Block(path, first_row, sessions, events, signals=signals)


def _unreadable(path: Location, first_row: int, num_sessions: int, encoder: EventEncoder) -> Block:
    """Return sessions of which nothing is known."""
    unknown = np.full(num_sessions, UNKNOWN_ID, np.int64)
    return Block(
        path,
        first_row,
        SessionRows(
            user_id=unknown,
            session_id=unknown,
            start_ts=unknown,
            offsets=np.zeros(num_sessions + 1, np.int64),
            reason=np.full(num_sessions, UNREADABLE, np.uint8),
            context=np.full((num_sessions, encoder.num_context), UNKNOWN_ID),
            first_piece=np.zeros(num_sessions, np.int64),
        ),
        EventRows(np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.uint8)),
        signals=np.empty((0, len(encoder.signals))) if encoder.signals else None,
    )


def _from_row(block: Block, first_row: int) -> Block:
    """Return a block without the sessions before a row of the file."""
    skip = first_row - block.first_row
    if skip <= 0:
        return block
    rows = block.sessions
    sessions = SessionRows(
        user_id=rows.user_id[skip:],
        session_id=rows.session_id[skip:],
        start_ts=rows.start_ts[skip:],
        offsets=rows.offsets[skip:],
        reason=rows.reason[skip:],
        context=rows.context[skip:],
        first_piece=rows.first_piece[skip:],
    )
    return replace(block, first_row=first_row, sessions=sessions)


def _owned(values: Ints) -> Ints:
    """Copy what may lie in Arrow's read-only memory: the kernels take writable arrays."""
    return np.array(values, np.int64)


def _context_columns(batch: pa.RecordBatch) -> dict[str, pa.Array]:
    """Return the columns that a feature of the context may read."""
    columns: dict[str, pa.Array] = {USER_ID: batch.column(USER_ID)}
    if CONTEXT in batch.schema.names:
        context = batch.column(CONTEXT)
        columns |= dict(zip((f.name for f in context.type), context.flatten(), strict=True))
    return columns


def _reasons(
    batch: pa.RecordBatch,
    columns: dict[str, pa.Array],
    offsets: Ints,
    events: EventRows,
    context: Ints,
    signals: Floats | None,
    encoder: EventEncoder,
) -> NDArray[np.uint8]:
    """Return for each session 0, or why it cannot be used (pipelines.rejects.REASONS)."""
    start_ts, end_ts = integers(batch.column(START_TS)), integers(batch.column(END_TS))
    ints = events.ints.reshape(-1, encoder.num_ints)
    item_id, timestamp = ints[:, 0], ints[:, 1]
    session = np.repeat(np.arange(batch.num_rows), np.diff(offsets))

    def any_event(flags: Any) -> Flags:
        return np.bincount(session[flags], minlength=batch.num_rows) > 0

    null_key = np.zeros(batch.num_rows, bool)
    for name in (USER_ID, SESSION_ID, START_TS, END_TS):
        null_key |= _is_null(batch.column(name))
    descends = np.zeros(len(timestamp), bool)
    descends[1:] = (timestamp[1:] < timestamp[:-1]) & (session[1:] == session[:-1])
    outside = (timestamp < start_ts[session]) | (timestamp > end_ts[session])
    infinite = np.isinf(events.floats.reshape(len(timestamp), encoder.num_floats)).any(axis=1)
    infinite_context = np.zeros(batch.num_rows, bool)
    for rows, placed, flags in (
        (ints, encoder.item_slots, infinite),
        (context, encoder.context_slots, infinite_context),
    ):
        for slot in placed:
            if slot.feature.is_number:
                flags |= np.isinf(read_numbers(rows, slot))
    if signals is not None:
        infinite |= np.isinf(signals).any(axis=1)
    tests = (
        null_key,
        np.diff(offsets) == 0,
        any_event(_is_null(columns[EVENT_ITEM_ID]) | _is_null(columns[EVENT_TIMESTAMP])),
        any_event(item_id < 0),
        any_event(is_absurd(timestamp)) | is_absurd(start_ts) | is_absurd(end_ts),
        any_event(descends),
        any_event(outside),
        any_event(infinite) | infinite_context,
    )
    reason = np.zeros(batch.num_rows, np.uint8)
    for code, failed in reversed(list(enumerate(tests, start=1))):
        reason[failed] = code
    return reason


def _is_null(values: pa.Array) -> Flags:
    if not values.null_count:
        return np.zeros(len(values), bool)
    return np.asarray(values.is_null().to_numpy(zero_copy_only=False))
