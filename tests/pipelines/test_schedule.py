from itertools import combinations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.schedule import SECONDS, disordered, filled, make_schedule


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
    assert schedule.rows_at(0).tolist() == [0] * len(end_ts)
    ends = {}
    for step, (number, rows) in enumerate(expected):
        assert schedule.window_of(step) == number
        assert schedule.rows_at(step + 1).tolist() == list(rows)
        ends[number] = step + 1
    opens = [0, *ends.values()][:-1]
    for step in range(len(expected) + 1):
        expected_end = list(ends.values())[opens.index(step)] if step in opens else None
        assert schedule.end_of_window(step) == expected_end


@given(
    end_ts=st.lists(st.integers(-1, 12), max_size=9),
)
@settings(deadline=None, max_examples=200)
def test_the_fewest_disordered_sessions_are_left_out(end_ts):
    times = np.array(end_ts, np.int64)
    flags = disordered(times)
    kept = times[~flags & (times >= 0)]
    assert (np.diff(kept) >= 0).all()
    assert not flags[times < 0].any()
    known = [t for t in end_ts if t >= 0]
    best = max(
        n
        for n in range(len(known) + 1)
        if any(list(c) == sorted(c) for c in combinations(known, n))
    )
    assert len(kept) == best
    whole = filled(times, flags, least=2)
    assert (np.diff(whole) >= 0).all()
    assert whole[~flags & (times >= 2)].tolist() == times[~flags & (times >= 2)].tolist()
