import numpy as np
import pytest

from pipelines.history import (
    ANCHOR,
    CLIPPED,
    EVENTS,
    FIRST_CONTEXT,
    NUM_EVENTS,
    NUM_HISTORY,
    SEQUENCES,
    SUPERVISED,
    USER,
    EventRows,
    HistoryStore,
    Rules,
    SequenceRows,
    SessionRows,
    empty_progress,
    size_classes,
)


def make_rules(*, max_events, slack, extra=4, kept_floats=1, max_session_events=100):
    return Rules(
        seed=0,
        purpose=2,
        max_events=max_events,
        keep=max_events + slack,
        extra=extra,
        max_session_events=max_session_events,
        sampled_rate=float("inf"),
        supervise_history=kept_floats > 0,
        num_ints=3,
        num_floats=1,
        num_kept_floats=kept_floats,
        num_codes=2,
    )


def draw_sessions(rng, num_sessions, num_users, longest):
    """Return sessions whose times wander back and forth, and their events, each with its number."""
    lengths = rng.integers(1, longest + 1, num_sessions)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    total = int(offsets[-1])
    start = np.maximum(np.arange(num_sessions) // 4 - rng.integers(0, 6, num_sessions), 0)
    place = np.arange(total) - np.repeat(offsets[:-1], lengths)
    times = np.repeat(start, lengths) + place // 2
    number = np.arange(total)
    ints = np.stack([number, times, -number], axis=1)
    codes = np.stack([number % 251, number % 7], axis=1).astype(np.uint8)
    sessions = SessionRows(
        user_id=rng.integers(0, num_users, num_sessions) - 5,
        session_id=np.arange(num_sessions),
        start_ts=start,
        offsets=offsets,
        reason=(rng.random(num_sessions) < 0.05).astype(np.uint8),
        context=np.arange(num_sessions)[:, None] + 0,
        first_piece=np.zeros(num_sessions, np.int64),
    )
    floats = (number / 2).astype(np.float32)
    return sessions, EventRows(ints.reshape(-1), floats, codes.reshape(-1))


def room_for(num_sequences, num_events):
    return SequenceRows(
        np.empty((num_sequences, FIRST_CONTEXT + 1), np.int64),
        EventRows(
            np.empty(num_events * 3, np.int64),
            np.empty(num_events, np.float32),
            np.empty(num_events * 2, np.uint8),
        ),
    )


def expected_items(sessions, events, rules):
    """Return per usable session its items, history first, and how many are history."""
    ints = events.ints.reshape(-1, 3)
    seen: dict[int, list[tuple[int, int]]] = {}
    sequences, clipped = [], 0
    for s, user in enumerate(sessions.user_id.tolist()):
        if sessions.reason[s]:
            continue
        own = [(int(t), int(i)) for i, t, _ in ints[sessions.offsets[s] : sessions.offsets[s + 1]]]
        mine = seen.setdefault(user, [])
        retained = sorted(mine, key=lambda e: e[0])[-rules.keep :]
        past = [item for t, item in retained if t < sessions.start_ts[s]][-rules.max_events :]
        clipped += len(past) < rules.max_events and len(mine) > rules.keep
        sequences.append((user, len(past), past + [item for _, item in own]))
        mine.extend(own)
    return sequences, clipped


@pytest.mark.parametrize(
    ("max_events", "slack", "longest", "num_users", "kept_floats"),
    [(5, 3, 4, 40, 1), (1, 1, 9, 40, 0), (40, 10, 6, 60, 1), (12, 30, 3, 700, 0)],
)
def test_histories_over_a_long_log(max_events, slack, longest, num_users, kept_floats):
    rng = np.random.default_rng(max_events)
    rules = make_rules(max_events=max_events, slack=slack, kept_floats=kept_floats)
    num_sessions = 6000
    sessions, events = draw_sessions(rng, num_sessions, num_users, longest)
    expected, expected_clipped = expected_items(sessions, events, rules)
    assert expected_clipped > 0 or slack > 20  # the drawn log reaches the case

    store, progress = HistoryStore(rules), empty_progress()
    out = room_for(num_sessions, num_sessions * (max_events + longest))
    for first in range(0, num_sessions, 37):
        last = min(first + 37, num_sessions)
        store.advance(sessions, events, first, last, partition=0, out=out, progress=progress)
        if first % 10 == 0:
            store.compact()
    assert progress[SEQUENCES] == len(expected)
    assert progress[CLIPPED] == expected_clipped
    rows, ints = out.rows[: len(expected)], out.events.ints[: progress[EVENTS] * 3].reshape(-1, 3)
    codes = out.events.codes[: progress[EVENTS] * 2].reshape(-1, 2)
    event = 0
    supervised = []
    for row, (user, num_history, items) in zip(rows, expected, strict=True):
        n = int(row[NUM_HISTORY] + row[NUM_EVENTS])
        assert (row[USER], row[NUM_HISTORY]) == (user, num_history)
        assert ints[event : event + n, 0].tolist() == items
        assert row[ANCHOR] == sessions.start_ts[row[FIRST_CONTEXT]]
        supervised += items if kept_floats else items[num_history:]
        event += n
    assert event == progress[EVENTS]
    # Every column moves with its event.
    assert (ints[:, 2] == -ints[:, 0]).all()
    assert (codes[:, 0] == ints[:, 0] % 251).all()
    assert (codes[:, 1] == ints[:, 0] % 7).all()
    assert out.events.floats[: progress[SUPERVISED]].tolist() == [i / 2 for i in supervised]


def test_extending_leaves_the_histories_of_advancing():
    rng = np.random.default_rng(1)
    rules = make_rules(max_events=6, slack=4)
    sessions, events = draw_sessions(rng, 900, 30, 5)
    results = []
    for gathered_before in (True, False):
        store = HistoryStore(rules)
        if gathered_before:
            store.advance(
                sessions,
                events,
                0,
                800,
                partition=0,
                out=room_for(800, 9000),
                progress=empty_progress(),
            )
        else:
            store.extend(sessions, events, 0, 123)
            store.extend(sessions, events, 123, 800)
        out, progress = room_for(100, 2000), empty_progress()
        store.advance(sessions, events, 800, 900, partition=0, out=out, progress=progress)
        results.append((progress.tolist(), out.events.ints[: progress[EVENTS] * 3].tolist()))
    assert results[0][0][SEQUENCES] > 80
    assert results[0][1:] == results[1][1:]


def test_memory_is_that_of_the_events_held():
    rng = np.random.default_rng(2)
    rules = make_rules(max_events=100, slack=28, extra=32, kept_floats=0)
    sessions, events = draw_sessions(rng, 40_000, 3000, 9)
    store = HistoryStore(rules)
    for first in range(0, 40_000, 1000):
        store.extend(sessions, events, first, first + 1000)
    usable = sessions.reason == 0
    held = np.zeros(3000)
    np.add.at(held, sessions.user_id[usable] + 5, np.diff(sessions.offsets)[usable])
    raw = np.minimum(held, rules.keep).sum() * (3 * 8 + 2)
    assert store.num_users == (held > 0).sum()
    assert store.num_bytes < 1.35 * raw + 80 * store.num_users


@pytest.mark.parametrize("keep", [0, 1, 3, 4, 5, 100, 1000])
def test_size_classes_ascend_to_keep_and_extra(keep):
    capacities = size_classes(keep, 32)
    assert (np.diff(capacities) > 0).all()
    assert capacities[-1] == keep + 32
    assert (capacities[1:-1] <= capacities[:-2] * 1.15 + 1).all()
