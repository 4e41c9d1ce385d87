"""Where one partition of the log stands: its next session, and its users' histories."""

from collections.abc import Iterator
from pathlib import Path

from pipelines.features import EventEncoder
from pipelines.gather import Span
from pipelines.history import HistoryStore, Rules
from pipelines.reader import Block, read_blocks
from pipelines.rejects import RejectLog

ROWS_PER_BLOCK = 4096


class PartitionReader:
    """Gives the sessions of one partition in order."""

    def __init__(
        self,
        partition: int,
        path: Path,
        encoder: EventEncoder,
        rules: Rules,
        rejects: RejectLog,
    ) -> None:
        """Stand before the first session, without histories."""
        self.partition = partition
        self._encoder = encoder
        self._rejects = rejects
        self._store = HistoryStore(rules)
        self._blocks = read_blocks(path, encoder, rows_per_block=ROWS_PER_BLOCK)
        self._block: Block | None = None
        self._cursor = 0

    def load_history(self, path: Path) -> None:
        """Append the users' starting histories."""
        for block in read_blocks(path, self._encoder, rows_per_block=ROWS_PER_BLOCK):
            self._rejects.add(self.partition, block, 0, block.num_sessions)
            self._store.extend(block.sessions, block.events, 0, block.num_sessions)

    def replay(self, num_sessions: int) -> None:
        """Append the next sessions to the histories, without giving them."""
        for span in self.take(num_sessions):
            self._store.extend(span.block.sessions, span.block.events, span.first, span.last)

    def take(self, num_sessions: int) -> Iterator[Span]:
        """Yield the next sessions, and note those that cannot be used.

        Their histories are right only if spans are used in the order in which they were taken.
        """
        while num_sessions > 0:
            if self._block is None or self._cursor == self._block.num_sessions:
                self._block, self._cursor = next(self._blocks), 0
            first, last = self._cursor, min(self._cursor + num_sessions, self._block.num_sessions)
            self._rejects.add(self.partition, self._block, first, last)
            num_sessions -= last - first
            self._cursor = last
            yield Span(self.partition, self._store, self._block, first, last)
