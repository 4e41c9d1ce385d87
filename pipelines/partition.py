"""Where one partition of the log stands: its next session, and its users' histories."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipelines.counter_snapshot import counters_name, read_counters, write_counters
from pipelines.decayed_counters import CounterStore, counter_rules, frontiers
from pipelines.event_memory import Spill
from pipelines.features import EventEncoder
from pipelines.gather import Span
from pipelines.history import HistoryStore, Ints, Rules
from pipelines.long_sessions import events_per_slice, in_slices
from pipelines.reader import DISORDERED, Block, read_blocks
from pipelines.rejects import RejectLog
from pipelines.segments import LogFile, LogSegments
from pipelines.snapshot import Standing, read_snapshot, snapshot_name, write_snapshot

ROWS_PER_BLOCK = 4096


class PartitionReader:
    """Gives the sessions of one partition in order."""

    def __init__(
        self,
        partition: int,
        segments: LogSegments,
        encoder: EventEncoder,
        rules: Rules,
        rejects: RejectLog,
        spill: Spill,
    ) -> None:
        """Stand before the first session of the first segment, without histories."""
        self.partition = partition
        self._segments = segments
        self._encoder = encoder
        self._rejects = rejects
        self._max_session_events = rules.max_session_events
        self._store = HistoryStore(rules, spill)
        self._counters = [CounterStore(rules) for rules in counter_rules(encoder)]
        self._num_begun = 0
        self._seek(0)

    def begin(self, num_begun: int) -> None:
        """Count what cannot be used of the segments up to the `num_begun`th, and load histories.

        Raises:
            ValueError: if more than max_reject_fraction of the sessions cannot be used.
        """
        for index in range(self._num_begun, num_begun):
            segment = self._segments[index]
            for files in (segment.histories, segment.parts):
                if files and files[self.partition].fault:
                    file = files[self.partition]
                    self._rejects.add_file(self.partition, file.path, file.num_sessions, file.fault)
            if segment.histories and not segment.histories[self.partition].fault:
                self._load_history(segment.histories[self.partition])
        self._num_begun = max(self._num_begun, num_begun)

    @property
    def histories(self) -> HistoryStore:
        """The users' histories, as they stand."""
        return self._store

    def replay(self, num_sessions: int) -> None:
        """Append the next sessions to the histories, without giving them."""
        for span in self.take(num_sessions):
            self._store.extend(span.block.sessions, span.block.events, span.first, span.last)

    def take(self, num_sessions: int) -> Iterator[Span]:
        """Yield the next sessions, and note those that cannot be used.

        Their histories are right only if spans are used in the order in which they were taken.
        """
        for block, first, last in self._cursor.take(num_sessions):
            self._rejects.add(self.partition, block, first, last)
            self._row += last - first
            self._count(block, first, last)
            yield Span(self.partition, self._store, block, first, last)

    def cursor(self) -> "Cursor":
        """Return a cursor of its own at the next session."""
        return Cursor(self._blocks_from(self._row))

    def peek(self, cursor: "Cursor", num_sessions: int) -> Iterator[Span]:
        """Yield the next sessions of a cursor, which stay to be taken."""
        for block, first, last in cursor.take(num_sessions):
            self._count(block, first, last, extend=False)
            yield Span(self.partition, self._store, block, first, last)

    def save(self, folder: Path, encoding: str) -> None:
        """Write a snapshot of the histories, as they stand after the sessions taken."""
        standing = self._standing(encoding, self._row)
        write_snapshot(self._path(folder), self._store, standing)
        if self._counters:
            write_counters(folder / counters_name(self.partition), self._counters, standing)

    def restore(self, folder: Path, encoding: str, row: int, num_begun: int) -> None:
        """Take up the histories of a snapshot, and stand where it was written.

        Args:
            folder: of the snapshots.
            encoding: of the configuration.
            row: sessions taken before.
            num_begun: segments begun before.

        Raises:
            ValueError: if the snapshot is missing, damaged or another one.
        """
        self._num_begun = num_begun
        expected = self._standing(encoding, row)
        counts = read_snapshot(self._path(folder), self._store, expected)
        if self._counters:
            read_counters(folder / counters_name(self.partition), self._counters, expected)
        self._rejects.restore(self.partition, counts)
        self._seek(row)

    def _path(self, folder: Path) -> Path:
        return folder / snapshot_name(self.partition)

    def _standing(self, encoding: str, row: int) -> Standing:
        begun = (self._segments[i].parts[self.partition] for i in range(self._num_begun))
        return Standing(
            partition=self.partition,
            rows=row,
            rejected=self._rejects.counts(self.partition),
            encoding=encoding,
            log=tuple(part.sha256 for part in begun),
        )

    def _seek(self, row: int) -> None:
        self._row = row
        self._cursor = self.cursor()

    def _blocks_from(self, row: int) -> Iterator[Block]:
        """Yield blocks from a row of the partition on, through all segments, also later ones."""
        index = 0
        while index < len(self._segments):
            segment = self._segments[index]
            begin = int(segment.first_rows[self.partition])
            end = begin + int(segment.schedule.rows_before[-1, self.partition])
            if row < end:
                file = segment.parts[self.partition]
                yield from self._blocks_of(file, first_row=max(row - begin, 0))
            index += 1

    def _count(self, block: Block, first: int, last: int, *, extend: bool = True) -> None:
        """Write the counters of sessions into their events, and count these."""
        for store in self._counters:
            assert block.signals is not None
            assert block.frontier is not None
            store.fill(
                *(block.sessions, block.events, block.signals, block.frontier),
                *(first, last),
                extend=extend,
            )

    def _frontiers(self, file: LogFile) -> Ints:
        try:
            return frontiers(file.path)
        except ValueError:  # gone since the log was opened: none of its sessions can be read
            return np.zeros(file.num_sessions, np.int64)

    def _blocks_of(self, file: LogFile, first_row: int = 0) -> Iterator[Block]:
        skip = 0
        frontier = self._frontiers(file) if self._counters else None
        if file.slices is not None:
            ends = np.cumsum(file.slices)
            session = int(np.searchsorted(ends, first_row, side="right"))
            first_row, skip = session, first_row - int(ends[session] - file.slices[session])
        for block in read_blocks(
            file.path,
            self._encoder,
            rows_per_block=ROWS_PER_BLOCK,
            first_row=first_row,
            num_rows=file.num_sessions,
        ):
            if file.disordered is not None:
                flags = file.disordered[block.first_row :][: block.num_sessions]
                reason = block.sessions.reason
                reason[flags & (reason == 0)] = DISORDERED
            if frontier is not None:
                mine = frontier[block.first_row :][: block.num_sessions]
                block = replace(block, frontier=mine)
            if file.slices is not None:
                slices = file.slices[block.first_row :][: block.num_sessions]
                most = events_per_slice(self._max_session_events)
                block, skip = in_slices(block, slices, most, skip), 0
            yield block

    def _load_history(self, file: LogFile) -> None:
        """Append the users' starting histories."""
        first = np.empty(0, np.int64)
        if self._counters and not self._segments[0].parts[self.partition].fault:
            first = self._frontiers(self._segments[0].parts[self.partition])[:1]
        for block in read_blocks(
            file.path,
            self._encoder,
            rows_per_block=ROWS_PER_BLOCK,
            num_rows=file.num_sessions,
        ):
            self._rejects.add(self.partition, block, 0, block.num_sessions)
            self._store.extend(block.sessions, block.events, 0, block.num_sessions)
            for store in self._counters:
                assert block.signals is not None
                frontier = int(first[0]) if len(first) else 0
                store.count(block.sessions, block.events, block.signals, frontier)


class Cursor:
    """Stands between two sessions of a run of blocks."""

    def __init__(self, blocks: Iterator[Block]) -> None:
        """Stand before the first one."""
        self._blocks = blocks
        self._block: Block | None = None
        self._next = 0

    def take(self, num_sessions: int) -> Iterator[tuple[Block, int, int]]:
        """Yield block, first and last (not included) of the next sessions."""
        while num_sessions > 0:
            if self._block is None or self._next == self._block.num_sessions:
                self._block, self._next = next(self._blocks), 0
            first, last = self._next, min(self._next + num_sessions, self._block.num_sessions)
            num_sessions -= last - first
            self._next = last
            yield self._block, first, last
