"""Which sessions each global step reads: a function of the log, not of the number of ranks.

A log may grow by segments (pipelines/segments.py), each of which has a schedule of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipelines.history import Ints

Window = Literal["none", "hour", "day"]
SECONDS: dict[Window, int] = {"hour": 3600, "day": 86400}


@dataclass(frozen=True)
class Schedule:
    """Steps of one segment. W windows that hold sessions, P partitions."""

    windows: Ints
    """(W,) int64 ascending: hours or days since the epoch; 0 without windows."""
    rows_before: Ints
    """(W + 1, P) int64: sessions of each partition before each window."""
    steps_before: Ints
    """(W + 1,) int64: global steps before each window."""
    sessions_per_partition: int

    @property
    def num_steps(self) -> int:
        """Global steps of the segment."""
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

    def end_of_window(self, step: int) -> int | None:
        """Return the step after the window that starts at `step`; None if none starts there."""
        i = self._index(step)
        opens = step < self.num_steps and step == self.steps_before[i]
        return int(self.steps_before[i + 1]) if opens else None

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


def disordered(end_ts: Ints) -> NDArray[np.bool_]:
    """Return (n,) flags: the fewest sessions without which the others ascend.

    The longest ascending subsequence stays, ties included: one session with a time far ahead costs
    itself, not all that come after it. Times below 0 are unknown and never disordered.

    Args:
        end_ts: (n,) int64 s.
    """
    known = end_ts[end_ts >= 0]
    flags = np.zeros(len(end_ts), bool)
    if (known[1:] < known[:-1]).any():
        flags[end_ts >= 0] = ~_longest_ascending(known)
    return flags


def filled(end_ts: Ints, left_out: NDArray[np.bool_], least: int = 0) -> Ints:
    """Return ascending end_ts: what is unknown or left out repeats the one before it.

    Args:
        end_ts: (n,) int64 s, below 0 where unknown.
        left_out: (n,) bool.
        least: earlier times are raised to this.
    """
    times: Ints = np.where(left_out, -1, end_ts)
    return np.maximum.accumulate(np.maximum(times, least))


@njit(cache=True)
def _longest_ascending(times: Ints) -> NDArray[np.bool_]:
    """Patience sorting: ends[k] is the smallest last time of an ascending run of k + 1."""
    ends = np.empty(len(times), np.int64)
    rank = np.empty(len(times), np.int64)
    longest = 0
    for i in range(len(times)):
        low, high = 0, longest
        while low < high:
            middle = (low + high) // 2
            if ends[middle] <= times[i]:
                low = middle + 1
            else:
                high = middle
        ends[low], rank[i] = times[i], low
        longest = max(longest, low + 1)
    kept = np.zeros(len(times), np.bool_)
    wanted, bound = longest - 1, np.int64(0x7FFFFFFFFFFFFFFF)
    for i in range(len(times) - 1, -1, -1):
        if wanted >= 0 and rank[i] == wanted and times[i] <= bound:
            kept[i], bound, wanted = True, times[i], wanted - 1
    return kept
