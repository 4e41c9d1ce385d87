"""Sessions that cannot be used: skipped, counted by reason, and too many of them stop the pass."""

from collections import Counter
from dataclasses import dataclass

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
)


@dataclass(frozen=True, slots=True)
class Reject:
    """A session that was skipped."""

    partition: int
    file: str
    row: int
    """Row of the file."""
    user_id: int
    """-1 where null."""
    session_id: int
    """-1 where null."""
    reason: str
    """One of REASONS."""


class RejectLog:
    """What one rank skipped."""

    def __init__(self, max_fraction: float, num_sessions: int) -> None:
        """Allow `max_fraction` of `num_sessions`, all that the rank will read."""
        self._max_fraction = max_fraction
        self._num_sessions = num_sessions
        self._counts: Counter[str] = Counter()
        self._new: list[Reject] = []

    def add(self, partition: int, block: Block, first: int, last: int) -> None:
        """Note the unusable ones of sessions first .. last - 1 of a block.

        Raises:
            ValueError: if they are too many by now.
        """
        sessions = block.sessions
        for session in range(first, last) if sessions.reason[first:last].any() else ():
            if sessions.reason[session]:
                reject = Reject(
                    partition=partition,
                    file=block.path.name,
                    row=block.first_row + session,
                    user_id=int(sessions.user_id[session]),
                    session_id=int(sessions.session_id[session]),
                    reason=REASONS[sessions.reason[session]],
                )
                self._new.append(reject)
                self._counts[reject.reason] += 1
        total = self._counts.total()
        if total > self._max_fraction * self._num_sessions:
            raise ValueError(
                f"{block.path}: {total} of {self._num_sessions} sessions cannot be used, more than "
                f"data.max_reject_fraction={self._max_fraction}: {dict(self._counts)}. The last "
                f"is row {self._new[-1].row}. Repair the log, or raise data.max_reject_fraction."
            )

    def take(self) -> list[Reject]:
        """Return what was noted since the last call."""
        new, self._new = self._new, []
        return new
