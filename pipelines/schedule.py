"""Which sessions each global step reads: a function of the log, not of the number of ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipelines.batch import StreamPosition
from pipelines.history import Ints

Window = Literal["none", "hour", "day"]
SECONDS: dict[Window, int] = {"hour": 3600, "day": 86400}


@dataclass(frozen=True)
class Schedule:
    """Steps of one pass. W windows that hold sessions, P partitions."""

    windows: Ints
    """(W,) int64 ascending: hours or days since the epoch; 0 without windows."""
    rows_before: Ints
    """(W + 1, P) int64: sessions of each partition before each window."""
    steps_before: Ints
    """(W + 1,) int64: global steps before each window."""
    sessions_per_partition: int

    @property
    def num_steps(self) -> int:
        """Global steps of a full pass."""
        return int(self.steps_before[-1])

    def window_of(self, step: int) -> int:
        """Return the window that a step, 0 .. num_steps - 1, reads."""
        return int(self.windows[self._index(step)])

    def rows_at(self, step: int) -> Ints:
        """Return (P,) int64: sessions of each partition consumed by the first `step` steps.

        Each step of a window takes `sessions_per_partition` of every partition that still has some;
        the window ends when none has.
        """
        if step == self.num_steps:
            last: Ints = self.rows_before[-1]
            return last
        i = self._index(step)
        taken = (step - int(self.steps_before[i])) * self.sessions_per_partition
        rows: Ints = np.minimum(self.rows_before[i] + taken, self.rows_before[i + 1])
        return rows

    def position(self, step: int) -> StreamPosition:
        """Return where a stream stands after the first `step` steps."""
        return StreamPosition(rows=tuple(self.rows_at(step).tolist()), step=step)

    def check(self, position: StreamPosition) -> None:
        """Refuse a position of another schedule.

        Raises:
            ValueError: if `position` is not one that this schedule passes through.
        """
        if not 0 <= position.step <= self.num_steps:
            raise ValueError(
                f"position: expected a step from 0 to {self.num_steps} for this log, got "
                f"{position.step}. Resume with the log and the data settings of the checkpoint."
            )
        expected = self.position(position.step)
        if position != expected:
            raise ValueError(
                f"position: after step {position.step} of this log {expected.rows} sessions of its "
                f"partitions are consumed, the position says {position.rows}. Resume with the log, "
                "data.sessions_per_partition and data.window of the checkpoint."
            )

    def _index(self, step: int) -> int:
        return int(np.searchsorted(self.steps_before, step, side="right")) - 1


def make_schedule(
    end_ts: Sequence[Ints], *, window: Window, offset_seconds: int, sessions_per_partition: int
) -> Schedule:
    """Return the schedule of a log.

    Args:
        end_ts: for each partition (n_p,) int64 s, ascending.
        window: barrier across partitions: a session belongs to the window of its end_ts.
        offset_seconds: added to end_ts before the window is taken.
        sessions_per_partition: sessions of each partition in a step.
    """
    numbers = [_windows(times, window, offset_seconds) for times in end_ts]
    windows = np.unique(np.concatenate(numbers))
    rows_before = np.zeros((len(windows) + 1, len(end_ts)), np.int64)
    for p, of_session in enumerate(numbers):
        rows_before[1:, p] = np.searchsorted(of_session, windows, side="right")
    most = np.diff(rows_before, axis=0).max(axis=1)
    steps_before = np.zeros(len(windows) + 1, np.int64)
    np.cumsum(-(-most // sessions_per_partition), out=steps_before[1:])
    return Schedule(windows, rows_before, steps_before, sessions_per_partition)


def _windows(end_ts: Ints, window: Window, offset_seconds: int) -> Ints:
    if window == "none":
        return np.zeros_like(end_ts)
    return (end_ts + offset_seconds) // SECONDS[window]
