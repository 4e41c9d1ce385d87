"""Events in the order of the log, one a row, to the files of a session-end log."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from threading import Lock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.manifest import PartitionFile, file_sha256
from pipelines.portable_hash import partition_of
from pipelines.schema import CONTEXT, END_TS, EVENTS, SESSION_ID, START_TS, USER_ID

PARTITION = "partition"
EVENT_PREFIX = "event_"
CONTEXT_PREFIX = "context_"
# Sessions in a row group: what a reader decodes at once.
ROW_GROUP_SESSIONS = 8192


@dataclass
class WrittenFiles:
    """What was written, a file a partition; threads may add to it."""

    files: list[PartitionFile] = field(default_factory=list)
    """By partition."""
    nulls: dict[str, int] = field(default_factory=dict)
    """Column of the event or context -> nulls."""
    start_ts: int = 2**63 - 1
    """Earliest start_ts in s."""
    end_ts: int = -1
    """Latest end_ts in s."""
    _lock: Lock = field(default_factory=Lock)

    def count_nulls(self, column: str, nulls: int) -> None:
        """Add to the nulls of a column."""
        with self._lock:
            self.nulls[column] = self.nulls.get(column, 0) + nulls

    def widen(self, start_ts: int, end_ts: int) -> None:
        """Extend the range of times."""
        with self._lock:
            self.start_ts = min(self.start_ts, start_ts)
            self.end_ts = max(self.end_ts, end_ts)


def write_partitions(
    batches: Iterable[pa.RecordBatch],
    folder: Path,
    schema: pa.Schema,
    *,
    partitions: int,
    seed: int,
    file_name: Callable[[int], str],
) -> WrittenFiles:
    """Write one file a partition, then read each back and check it.

    Args:
        batches: rows ordered by (partition, end_ts, user_id, session_id, place in the session),
            with columns partition, user_id, session_id, start_ts, end_ts, and event_NAME and
            context_NAME for each NAME of the schema. The context is that of the first row.
        folder: where the files go.
        schema: of the log.
        partitions: number of files; one without rows is written too.
        seed: of the partition's hash.
        file_name: partition -> name of its file.

    Raises:
        RuntimeError: if a file read back is not in order or not of its partition.
    """
    written = WrittenFiles()
    by_partition = groupby(_pieces(sessions_of(batches, schema, written)), key=itemgetter(0))
    ahead = next(by_partition, None)
    for partition in range(partitions):
        path = folder / file_name(partition)
        if ahead is not None and ahead[0] == partition:
            write_sessions((table for _, table in ahead[1]), path, schema)
            ahead = next(by_partition, None)
        else:
            write_sessions(iter(()), path, schema)
        written.files.append(check_file(path, partition, partitions, seed, written))
    return written


def write_sessions(tables: Iterator[pa.Table], path: Path, schema: pa.Schema) -> None:
    """Write the sessions of one partition, in order; the sizes of the tables change no byte."""
    with pq.ParquetWriter(path, schema, write_page_checksum=True, **_encoding(schema)) as writer:
        for group in _regroup(tables):
            writer.write_table(group, row_group_size=ROW_GROUP_SESSIONS)


def _encoding(schema: pa.Schema) -> dict[str, object]:
    """Return how columns are encoded: for fast decoding first, for size second.

    Times as differences, ids plain, LZ4: smaller than the default and 1.6 to 1.9 times as fast to
    decode. Columns of the context hold few values, so a dictionary shrinks them.
    """
    times = [START_TS, END_TS, f"{EVENTS}.list.element.timestamp"]
    names = (
        [
            f"{CONTEXT}.{x.name}" + ".list.element" * pa.types.is_list(x.type)
            for x in schema.field(CONTEXT).type
        ]
        if CONTEXT in schema.names
        else []
    )
    return {
        "compression": "lz4",
        "column_encoding": dict.fromkeys(times, "DELTA_BINARY_PACKED"),
        "use_dictionary": names or False,
    }


def sessions_of(
    batches: Iterable[pa.RecordBatch], schema: pa.Schema, written: WrittenFiles
) -> Iterator[tuple[np.ndarray, pa.Table]]:
    """Yield (partition of each session, sessions), in order; a session is never cut.

    Args:
        batches: rows as `write_partitions` reads them.
        schema: of the log.
        written: nulls are added to it.
    """
    rows: pa.Table | None = None
    for batch in batches:
        table = pa.Table.from_batches([batch])
        rows = table if rows is None else pa.concat_tables([rows, table]).combine_chunks()
        starts = _session_starts(rows)
        if len(starts) > 1:
            # The last session may go on in the next batch.
            yield _whole_sessions(rows.slice(0, starts[-1]), starts[:-1], schema, written)
            rows = rows.slice(starts[-1])
    if rows is not None and rows.num_rows:
        yield _whole_sessions(rows, _session_starts(rows), schema, written)


def _session_starts(rows: pa.Table) -> np.ndarray:
    """Return the index of each session's first row; (S,) int64."""
    changed = np.ones(rows.num_rows, dtype=bool)
    changed[1:] = False
    for name in (PARTITION, USER_ID, SESSION_ID):
        values = rows[name].to_numpy()
        changed[1:] |= values[1:] != values[:-1]
    return np.flatnonzero(changed)


def _whole_sessions(
    rows: pa.Table, starts: np.ndarray, schema: pa.Schema, written: WrittenFiles
) -> tuple[np.ndarray, pa.Table]:
    """Return (partition of each session, one row a session) of rows that begin with a session."""
    rows = rows.combine_chunks()
    heads = rows.take(pa.array(starts))
    offsets = np.append(starts, rows.num_rows)
    return heads[PARTITION].to_numpy(), nest(heads, rows, offsets, schema, written)


def nest(
    heads: pa.Table, events: pa.Table, offsets: np.ndarray, schema: pa.Schema, written: WrittenFiles
) -> pa.Table:
    """Return sessions as the log holds them, one a row.

    Args:
        heads: (S,) user_id, session_id, start_ts, end_ts, context_NAME.
        events: (E,) event_NAME.
        offsets: (S + 1,): events of session s are rows offsets[s]:offsets[s + 1].
        schema: of the log.
        written: nulls are added to it.
    """
    columns = {name: heads[name] for name in (USER_ID, SESSION_ID, START_TS, END_TS)}
    if CONTEXT in schema.names:
        columns[CONTEXT] = _struct(heads, CONTEXT_PREFIX, schema.field(CONTEXT).type, written)
    event = _struct(events, EVENT_PREFIX, schema.field(EVENTS).type.value_type, written)
    bounds = pa.array(offsets.astype(np.int32))
    columns[EVENTS] = pa.ListArray.from_arrays(bounds, event, type=schema.field(EVENTS).type)
    return pa.table(columns, schema=schema)


def _struct(rows: pa.Table, prefix: str, kind: pa.StructType, written: WrittenFiles) -> pa.Array:
    arrays = []
    for leaf in kind:
        values = rows[prefix + leaf.name].combine_chunks()
        written.count_nulls(leaf.name, values.null_count)
        arrays.append(values.cast(leaf.type))
    return pa.StructArray.from_arrays(arrays, fields=list(kind))


def _pieces(sessions: Iterator[tuple[np.ndarray, pa.Table]]) -> Iterator[tuple[int, pa.Table]]:
    """Yield (partition, sessions of it), cut where the partition changes."""
    for partition, table in sessions:
        cuts = [0, *(np.flatnonzero(np.diff(partition)) + 1), len(partition)]
        for start, end in pairwise(cuts):
            yield int(partition[start]), table.slice(start, end - start)


def _regroup(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Yield tables of ROW_GROUP_SESSIONS rows, the last as it is."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(x.num_rows for x in held) >= ROW_GROUP_SESSIONS:
            joined = pa.concat_tables(held)
            whole = joined.num_rows // ROW_GROUP_SESSIONS * ROW_GROUP_SESSIONS
            yield joined.slice(0, whole)
            held = [joined.slice(whole)]
    if held:
        yield pa.concat_tables(held)


def check_file(
    path: Path, partition: int, partitions: int, seed: int, written: WrittenFiles
) -> PartitionFile:
    """Read a file back, compare it with what a reader relies on, and describe it.

    Args:
        path: the file.
        partition: its number.
        partitions: of the log.
        seed: of the partition's hash.
        written: its time range is widened to this file's.

    Raises:
        RuntimeError: if the file is not in order or not of its partition.
    """
    num_sessions = num_events = longest = 0
    last: tuple[int, int, int] | None = None
    first_end: int | None = None
    names = [USER_ID, SESSION_ID, START_TS, END_TS, f"{EVENTS}.list.element.timestamp"]
    with pq.ParquetFile(path) as parquet:
        for index in range(parquet.num_row_groups):
            rows = parquet.read_row_group(index, columns=names)
            if rows.num_rows == 0:
                continue
            user, session, start, end = (rows[name].to_numpy() for name in names[:4])
            events = rows[EVENTS].combine_chunks()
            offsets = events.offsets.to_numpy()
            times = events.values.field("timestamp").to_numpy()
            falls = np.flatnonzero(np.diff(times) < 0) + 1
            keys = np.array([end, user, session]).T
            if last is not None:
                keys = np.vstack([np.array([last]), keys])
            good = (
                np.all(partition_of(user, seed, partitions) == partition)
                and np.all(np.diff(offsets) > 0)
                and np.array_equal(times[offsets[:-1]], start)
                and np.array_equal(times[offsets[1:] - 1], end)
                and np.all(np.isin(falls, offsets))
                and _ascending(keys)
            )
            if not good:
                raise RuntimeError(
                    f"{path}, row group {index}: sessions are not ordered by (end_ts, user_id, "
                    "session_id), not of this partition, or their events not by time; report this "
                    "as a defect with the versions of duckdb and pyarrow"
                )
            num_sessions += rows.num_rows
            num_events += len(times)
            longest = max(longest, int(np.diff(offsets).max()))
            last = (int(end[-1]), int(user[-1]), int(session[-1]))
            first_end = int(end[0]) if first_end is None else first_end
            written.widen(int(start.min()), last[0])
    return PartitionFile(
        name=path.name,
        num_sessions=num_sessions,
        num_events=num_events,
        first_end_ts=first_end,
        last_end_ts=last[0] if last else None,
        num_bytes=path.stat().st_size,
        sha256=file_sha256(path),
        longest_session=longest,
    )


def _ascending(keys: np.ndarray) -> bool:
    """Return whether the rows of (N, K) strictly ascend in lexicographic order."""
    before, after = keys[:-1], keys[1:]
    equal = np.ones(len(before), dtype=bool)
    for column in range(keys.shape[1]):
        if np.any(equal & (after[:, column] < before[:, column])):
            return False
        equal &= after[:, column] == before[:, column]
    return not equal.any()
