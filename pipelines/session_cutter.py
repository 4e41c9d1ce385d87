"""Events in any order to sessions in the order of the log, one partition at a time.

Events are dealt out to their partitions as they come; what outgrows memory waits in files. Then
each partition is sorted once, by small keys: the other columns are moved only when their last place
is known. An engine's windows and sorts of whole rows give the same log at several times the cost;
`sessionize` still asks for them where a partition does not fit into memory.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.manifest import PartitionFile
from pipelines.schema import END_TS, EVENT_ITEM_ID, EVENT_TIMESTAMP, SESSION_ID, START_TS, USER_ID
from pipelines.session_writer import (
    CONTEXT_PREFIX,
    EVENT_PREFIX,
    PARTITION,
    WrittenFiles,
    check_file,
    nest,
    sessions_of,
    write_sessions,
)

Ints = NDArray[np.int64]

# Columns that say where an event lies in the input; not part of what it is.
PLACE = ("file", "row")
ORDER = "order"
NAMED_SESSION = "named_session"

_ROW_BITS = 40  # as in pipelines.session_expression
_US = 1_000_000
# Memory of sorting a partition, over its rows': the rows, their sorted copy, keys and places.
_WORK = 4


class Dealer:
    """Rows of events by partition, in memory up to a bound, beyond it in files."""

    def __init__(self, partitions: int, folder: Path, max_bytes: float) -> None:
        """Hold nothing.

        Args:
            partitions: their number.
            folder: where files go; exists.
            max_bytes: of the rows in memory.
        """
        self.num_bytes = np.zeros(partitions, np.int64)
        """(P,): bytes of each partition's rows."""
        self.num_rows = np.zeros(partitions, np.int64)
        """(P,): rows of each partition."""
        self._folder, self._max_bytes, self._in_memory = folder, max_bytes, 0
        self._held: list[list[pa.RecordBatch]] = [[] for _ in range(partitions)]
        self._files: list[list[Path]] = [[] for _ in range(partitions)]

    def add(self, batch: pa.RecordBatch) -> None:
        """Take rows; their column `partition` says whose they are."""
        partition = batch[PARTITION].to_numpy()
        if len(self._held) < 1 << 16:
            partition = partition.astype(np.uint16)  # sorted by radix
        batch = batch.drop_columns([PARTITION]).take(pa.array(partition.argsort(kind="stable")))
        counts = np.bincount(partition, minlength=len(self._held))
        begin, bytes_per_row = 0, batch.nbytes / max(1, batch.num_rows)
        for p in np.flatnonzero(counts).tolist():
            self._held[p].append(batch.slice(begin, counts[p]))
            begin += counts[p]
        self.num_rows += counts
        self.num_bytes += (counts * bytes_per_row).astype(np.int64)
        self._in_memory += batch.nbytes
        if self._in_memory > self._max_bytes:
            for each in range(len(self._held)):
                self._spill(each)
            self._in_memory = 0

    def take(self, partition: int) -> pa.Table | None:
        """Return all rows of a partition, which are held no longer; None if there are none."""
        tables = [pq.read_table(path, memory_map=True) for path in self._files[partition]]
        held, self._held[partition] = self._held[partition], []
        if held:
            tables.append(pa.Table.from_batches(held))
        for path in self._files[partition]:
            path.unlink()
        self._files[partition] = []
        return pa.concat_tables(tables).combine_chunks() if tables else None

    def files(self, partition: int) -> Sequence[Path]:
        """Return Parquet files of all rows of a partition that has some."""
        self._spill(partition)
        return self._files[partition]

    def _spill(self, partition: int) -> None:
        held, self._held[partition] = self._held[partition], []
        if held:
            path = self._folder / f"{partition}-{len(self._files[partition])}.parquet"
            pq.write_table(
                pa.Table.from_batches(held), path, compression="lz4", use_dictionary=False
            )
            self._files[partition].append(path)


@dataclass(frozen=True, slots=True)
class CutRules:
    """How events become sessions."""

    gap_seconds: int
    """A longer silence ends a session."""
    duplicates: str
    """Repeats that are dropped, as in SessionizeConfig."""
    session: int | None = None
    """If not None, all events of a user are one session of this id."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Sessions of a partition in the order of the log."""

    heads: pa.Table
    """(S,) user_id, session_id, start_ts, end_ts, and context_NAME of the first event."""
    events: pa.Table
    """(E,) event_NAME; events of session s are rows offsets[s]:offsets[s + 1]."""
    offsets: Ints
    """(S + 1,) int64."""


def cut_sessions(rows: pa.Table, rules: CutRules) -> Cut:
    """Return the sessions of a partition, repeats dropped.

    Args:
        rows: events in any order, at least one: user_id, item_id, time (int64 us), file, row,
            event_NAME, context_NAME; `order` where the user gave one; `named_session` where the log
            names its sessions.
        rules: how they are cut.

    Source: the steps without_repeats, in_sessions and in_order of pipelines.session_expression.
    """
    user, time = rows[USER_ID].to_numpy(), rows["time"].to_numpy()
    place = (rows["file"].to_numpy() << _ROW_BITS) | rows["row"].to_numpy()
    by_order = [_rank(rows[ORDER])] if ORDER in rows.column_names else []
    index = np.lexsort((place, *by_order, time, user))
    if rules.duplicates != "keep":
        index = _without_repeats(rows, index, user, time, rules.duplicates)

    if NAMED_SESSION in rows.column_names and rules.session is None:
        named = rows[NAMED_SESSION].to_numpy()
        # The events of a name need not follow each other; the sort keeps their order.
        index = index[np.lexsort((named[index], user[index]))]
        starts = np.flatnonzero(_changes(user[index]) | _changes(named[index]))
        session_id = named[index[starts]]
    else:
        is_first = _changes(user[index])
        starts, session_id = np.flatnonzero(is_first), rules.session
        if session_id is None:
            silence = np.diff(time[index], prepend=0)
            starts = np.flatnonzero(is_first | (silence > rules.gap_seconds * _US))
            # A user's sessions are numbered from 0 in order of time.
            number = np.arange(len(starts))
            session_id = number - np.maximum.accumulate(number * is_first[starts])
        session_id = np.broadcast_to(session_id, starts.shape)

    ends = np.append(starts[1:], len(index))
    user_id = user[index[starts]]
    start_ts, end_ts = time[index[starts]] // _US, time[index[ends - 1]] // _US
    order = np.lexsort((session_id, user_id, end_ts))
    lengths = (ends - starts)[order]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    index = index[np.arange(len(index)) + np.repeat(starts[order] - offsets[:-1], lengths)]

    columns = {
        USER_ID: user_id[order],
        SESSION_ID: session_id[order],
        START_TS: start_ts[order],
        END_TS: end_ts[order],
    }
    firsts = pa.array(index[offsets[:-1]])
    for name in rows.column_names:
        if name.startswith(CONTEXT_PREFIX):
            columns[name] = rows[name].take(firsts)
    places = pa.array(index)
    events = {
        EVENT_PREFIX + EVENT_ITEM_ID: rows["item_id"].take(places),
        EVENT_PREFIX + EVENT_TIMESTAMP: time[index] // _US,
    }
    for name in rows.column_names:
        if name.startswith(EVENT_PREFIX):
            events[name] = rows[name].take(places)
    return Cut(pa.table(columns), pa.table(events), offsets)


def _changes(values: Ints) -> NDArray[np.bool_]:
    """Return where a value is not the one before; the first never is."""
    changed = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=changed[1:])
    return changed


def _rank(values: pa.ChunkedArray) -> Ints:
    """Return integers that order rows as values do, nulls last."""
    if pa.types.is_boolean(values.type):
        values = pc.cast(values, pa.int8())
    ranks = pc.rank(values, sort_keys="ascending", tiebreaker="dense")
    return np.asarray(ranks.to_numpy(), np.int64)


def _without_repeats(rows: pa.Table, index: Ints, user: Ints, time: Ints, duplicates: str) -> Ints:
    """Return `index`, which orders rows by user, time and place, less the repeats."""
    follows = ~(_changes(user[index]) | _changes(time[index]))
    # Only events of one user and time can be repeats: few in most logs.
    tied = follows.copy()
    tied[:-1] |= follows[1:]
    among = np.flatnonzero(tied)
    if not len(among):
        return index
    same = [USER_ID, "time", "item_id"]
    if duplicates == "exact":
        same += [name for name in rows.column_names if name not in (ORDER, *PLACE, *same)]
    table = rows.select(same).take(pa.array(index[among]))
    for i, name in enumerate(same):
        if pa.types.is_floating(table[name].type):
            # -0.0 is no value of its own.
            table = table.set_column(i, name, pc.add(table[name], 0.0))
        elif pa.types.is_list(table[name].type) or pa.types.is_large_list(table[name].type):
            # Arrow does not group by lists; these are the few rows that may be repeats.
            table = table.set_column(i, name, pa.array(map(repr, table[name].to_pylist())))
    table = table.append_column("at", pa.array(among))
    firsts = table.group_by(same, use_threads=False).aggregate([("at", "min")])["at_min"]
    keep = ~tied
    keep[firsts.to_numpy()] = True
    return index[keep]


def write_cut(
    dealer: Dealer,
    rules: CutRules,
    folder: Path,
    schema: pa.Schema,
    *,
    seed: int,
    file_name: Callable[[int], str],
    threads: int,
    max_bytes: float,
    in_order: Callable[[Sequence[Path]], Iterable[pa.RecordBatch]],
) -> WrittenFiles:
    """Write one file a partition, then read each back and check it.

    Args:
        dealer: holds the events; drained.
        rules: how they become sessions.
        folder: where the files go.
        schema: of the log.
        seed: of the partition's hash.
        file_name: partition -> name of its file.
        threads: most partitions that are sorted at once.
        max_bytes: of memory.
        in_order: gives the events of Parquet files in order, as `write_partitions` reads them: for
            partitions that do not fit into memory.

    Raises:
        RuntimeError: if a file read back is not in order or not of its partition.
    """
    written, partitions = WrittenFiles(), len(dealer.num_rows)
    needs = dealer.num_bytes * _WORK

    def write(p: int, tables: Iterable[pa.Table]) -> PartitionFile:
        path = folder / file_name(p)
        write_sessions(iter(tables), path, schema)
        return check_file(path, p, partitions, seed, written)

    def write_small(p: int) -> PartitionFile | None:
        if needs[p] > max_bytes:
            return None
        rows = dealer.take(p)
        if rows is None:
            return write(p, ())
        cut = cut_sessions(rows, rules)
        return write(p, [nest(cut.heads, cut.events, cut.offsets, schema, written)])

    largest = int(needs[needs <= max_bytes].max(initial=1))
    with ThreadPoolExecutor(min(threads, max(1, int(max_bytes / largest)))) as pool:
        files = list(pool.map(write_small, range(partitions)))
    for p, file in enumerate(files):
        if file is None:
            sessions = sessions_of(in_order(dealer.files(p)), schema, written)
            file = write(p, (table for _, table in sessions))
        written.files.append(file)
    return written
