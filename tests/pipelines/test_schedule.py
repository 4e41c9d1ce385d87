import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.batch import StreamPosition
from pipelines.schedule import SECONDS, make_schedule


def simulate(end_ts, window, offset, sessions):
    """Yield (window, rows per partition) step by step, by reading one session after another."""
    at = [0] * len(end_ts)

    def number(p):
        if at[p] == len(end_ts[p]):
            return None
        return 0 if window == "none" else (end_ts[p][at[p]] + offset) // SECONDS[window]

    while any(number(p) is not None for p in range(len(at))):
        current = min(n for p in range(len(at)) if (n := number(p)) is not None)
        for p in range(len(at)):
            for _ in range(sessions):
                if number(p) == current:
                    at[p] += 1
        yield current, tuple(at)


times = st.lists(st.integers(0, 20000), max_size=25).map(sorted)


@given(
    end_ts=st.lists(times, min_size=1, max_size=4),
    window=st.sampled_from(["none", "hour", "day"]),
    offset=st.sampled_from([0, 1800, -7000]),
    sessions=st.integers(1, 4),
)
@settings(deadline=None, max_examples=150)
def test_schedule_equals_simulation(end_ts, window, offset, sessions):
    schedule = make_schedule(
        [np.array(t, np.int64) for t in end_ts],
        window=window,
        offset_seconds=offset,
        sessions_per_partition=sessions,
    )
    expected = list(simulate(end_ts, window, offset, sessions))
    assert schedule.num_steps == len(expected)
    assert schedule.position(0) == StreamPosition(rows=(0,) * len(end_ts), step=0)
    for step, (number, rows) in enumerate(expected):
        assert schedule.window_of(step) == number
        assert schedule.position(step + 1) == StreamPosition(rows=rows, step=step + 1)
        schedule.check(StreamPosition(rows=rows, step=step + 1))


@pytest.mark.parametrize(
    "position", [StreamPosition((1, 0), 1), StreamPosition((2,), 1), StreamPosition((9, 9), 9)]
)
def test_position_of_another_schedule_is_refused(position):
    schedule = make_schedule(
        [np.array([1, 2, 3]), np.array([5])],
        window="none",
        offset_seconds=0,
        sessions_per_partition=2,
    )
    with pytest.raises(ValueError, match=r"position: .*Resume with the log"):
        schedule.check(position)
