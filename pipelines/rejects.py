"""Sessions that cannot be used: skipped, counted by reason, and too many of them stop the pass."""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from pipelines.feature_columns import UNKNOWN_ID
from pipelines.location import Location, path_within
from pipelines.reader import Block

# Codes of SessionRows.reason. Where several hold, the first one counts.
REASONS = (
    "",
    "null user_id, session_id, start_ts or end_ts",
    "no events",
    "null event, item_id or timestamp",
    "negative item_id",
    "timestamp before 1970 or after 9999",
    "event timestamps not ascending",
    "event outside start_ts .. end_ts",
    "label or dense feature not finite",
    "part of the file cannot be read",
    "session out of the order of end_ts",
    "file is missing or cannot be used",
)
WHOLE_FILE = REASONS[-1]


@dataclass(frozen=True, slots=True)
class Reject:
    """A session that was skipped, or several that stand together in a file."""

    partition: int
    file: str
    """Path within the log."""
    row: int
    """Row of the file, the first one of several."""
    user_id: int
    """-1 where null or not known."""
    session_id: int
    """-1 where null or not known."""
    reason: str
    """One of REASONS."""
    num_sessions: int = 1
    """Consecutive sessions from `row` on."""
    detail: str = ""
    """What is wrong with the file as a whole."""


class RejectLog:
    """What one rank skipped."""

    def __init__(self, max_fraction: float, folder: Location) -> None:
        """Allow `max_fraction` of all sessions of `folder` that the rank will read (`expect`)."""
        self._max_fraction = max_fraction
        self._folder = folder
        self._num_sessions = 0
        self._counts: dict[int, Counter[str]] = {}
        self._new: list[Reject] = []

    def expect(self, num_sessions: int) -> None:
        """Note that the rank will read so many more sessions."""
        self._num_sessions += num_sessions

    def counts(self, partition: int) -> dict[str, int]:
        """Return reason -> sessions skipped of a partition."""
        return dict(self._counts.get(partition, {}))

    def restore(self, partition: int, counts: dict[str, int]) -> None:
        """Take over the counts of a partition from an earlier process."""
        self._counts[partition] = Counter(counts)

    def add(self, partition: int, block: Block, first: int, last: int) -> None:
        """Note the unusable ones of sessions first .. last - 1 of a block.

        Raises:
            ValueError: if they are too many by now.
        """
        sessions = block.sessions
        # Of a session that is read in slices the first one counts for all.
        if not sessions.reason[first:last].any():
            return
        bad = (sessions.reason[first:last] != 0) & (sessions.first_piece[first:last] == 0)
        if not bad.any():
            return
        for session in (first + np.flatnonzero(bad)).tolist():
            reject = Reject(
                partition=partition,
                file=path_within(block.path, self._folder),
                row=block.row_of(session),
                user_id=int(sessions.user_id[session]),
                session_id=int(sessions.session_id[session]),
                reason=REASONS[sessions.reason[session]],
            )
            self._append(reject)
        self._check(f"{block.path}", f"The last is row {self._new[-1].row}.")

    def add_file(self, partition: int, path: Location, num_sessions: int, why: str) -> None:
        """Note that a file cannot be used at all.

        Args:
            partition: of the file.
            path: the file.
            num_sessions: sessions that the manifest says it has.
            why: what is wrong, in words.

        Raises:
            ValueError: if too many sessions are skipped by now.
        """
        file = path_within(path, self._folder)
        self._append(Reject(partition, file, 0, -1, -1, WHOLE_FILE, num_sessions, why))
        self._check(f"{path}", f"{why}.")

    def take(self) -> list[Reject]:
        """Return what was noted since the last call."""
        new, self._new = self._new, []
        return new

    def _append(self, reject: Reject) -> None:
        last = self._new[-1] if self._new else None
        if (
            last
            and reject == replace(last, row=reject.row, num_sessions=1)
            and (reject.user_id == reject.session_id == UNKNOWN_ID)
            and reject.row == last.row + last.num_sessions
        ):
            # One line for a stretch of sessions of which nothing is known.
            self._new[-1] = replace(last, num_sessions=last.num_sessions + 1)
        else:
            self._new.append(reject)
        counts = self._counts.setdefault(reject.partition, Counter())
        counts[reject.reason] += reject.num_sessions

    def _check(self, where: str, what: str) -> None:
        counts: Counter[str] = sum(self._counts.values(), Counter())
        if counts.total() > self._max_fraction * self._num_sessions:
            raise ValueError(
                f"{where}: {counts.total()} of {self._num_sessions} sessions cannot be used, more "
                f"than data.max_reject_fraction={self._max_fraction}: {dict(counts)}. {what} "
                "Repair the log, or raise data.max_reject_fraction."
            )


def count_sessions(rejects: list[Reject]) -> dict[str, int]:
    """Return reason -> sessions."""
    counts: Counter[str] = Counter()
    for reject in rejects:
        counts[reject.reason] += reject.num_sessions
    return dict(counts)
