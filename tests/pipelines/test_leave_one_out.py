"""User sequences and their epochs against plain Python over the rows of the file."""

import hashlib
import random
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.config import (
    ActionConfig,
    DataConfig,
    FeatureConfig,
    LeaveOneOutConfig,
    TaskConfig,
)
from pipelines.datasets.catalogue import find
from pipelines.datasets.convert import convert
from pipelines.leave_one_out import LeaveOneOutStream
from pipelines.user_sequences import read_user_sequences

EPOCHS = 3
COUNTER = FeatureConfig(encoding="zscore", counter="user", half_life_hours=1.0)


def write_events(path: Path, rows) -> Path:
    """Write (user, item, time, rating) rows."""
    users, items, times, ratings = zip(*rows, strict=True)
    columns = {"user_id": users, "item_id": items, "timestamp": times, "rating": ratings}
    pq.write_table(pa.table(columns), path)
    return path


def drawn_rows(seed: int, *, text: bool = False):
    rng = random.Random(seed)
    rows = []
    for _ in range(rng.randint(30, 120)):
        user, item = rng.randrange(8), 10 * rng.randrange(12)
        time = 1_000 + rng.randrange(40)  # many ties
        rows.append(
            (f"u{user}" if text else user, f"i{item:03}" if text else item, time, rng.random())
        )
    return rows


def sequences_by_hand(rows, least):
    """Return user -> [(item, time, rating)] in the order of users, as the docstrings say it."""
    of_user, of_item = Counter(r[0] for r in rows), Counter(r[1] for r in rows)
    found = defaultdict(list)
    for user, item, time, rating in rows:
        if of_user[user] >= least and of_item[item] >= least:
            found[user].append((item, time, rating))
    for events in found.values():
        events.sort(key=lambda e: e[1])
    return {user: found[user] for user in sorted(found) if len(found[user]) >= 3}


def config_of(path, by_hand, **changes) -> DataConfig:
    rules = {"epochs": EPOCHS, "users_per_batch": 3, "scored_users_per_batch": 4, "min_events": 4}
    base = DataConfig(
        log=str(path),
        window="epoch",
        layout="merged",
        supervise="all",
        max_history_tokens=5,
        num_items=len({e[0] for events in by_hand.values() for e in events}) or 1,
        prefetch=0,
        leave_one_out=LeaveOneOutConfig(**(rules | changes.pop("rules", {}))),
    )
    return replace(base, **changes)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), text=st.booleans())
def test_sequences_are_those_of_plain_python(tmp_path_factory, seed, text):
    rows = drawn_rows(seed, text=text)
    path = write_events(tmp_path_factory.mktemp("log") / "events.parquet", rows)
    by_hand = sequences_by_hand(rows, 4)
    config = config_of(path, by_hand)
    if not by_hand:
        with pytest.raises(ValueError, match=f"nothing is left of {len(rows)} events"):
            read_user_sequences(config)
        return
    found = read_user_sequences(config)
    items = sorted({e[0] for events in by_hand.values() for e in events})
    flat = [e for events in by_hand.values() for e in events]
    assert found.offsets.tolist()[1:] == [
        sum(len(e) for e in list(by_hand.values())[: i + 1]) for i in range(len(by_hand))
    ]
    assert [items[i] for i in found.ints[:, 0]] == [e[0] for e in flat]
    assert found.ints[:, 1].tolist() == [e[1] for e in flat]
    assert sum(found.left_out.values()) == len(rows) - len(flat)
    lines = [f"{u}\t{' '.join(str(e[0]) for e in events)}\n" for u, events in by_hand.items()]
    assert found.fingerprint == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_the_publishers_file_gives_the_sequences_of_the_filtered_parquet(tmp_path):
    """ratings.dat, in the order of users, against rows in time order without rare items."""
    rng, rows = random.Random(1), []
    for user in range(1, 30):
        for item in rng.sample(range(60), rng.randint(20, 40)):
            # Item 59 is rare by its number: the filter of five finds it.
            if item != 59 or user < 5:
                rows.append((user, item, 978_300_000 + rng.randrange(30), rng.randint(1, 5)))
    (tmp_path / "ratings.dat").write_text("".join(f"{u}::{i}::{r}::{t}\n" for u, i, t, r in rows))
    convert(find("movielens-1m"), tmp_path, tmp_path / "ml1m", partial=True)
    events = [(u, i, t, float(r)) for u, i, t, r in rows if i != 59]
    events.sort(key=lambda e: e[2])
    plain = write_events(tmp_path / "plain.parquet", events)
    by_hand = sequences_by_hand(rows, 5)
    of_file, of_plain = (
        read_user_sequences(config_of(path, by_hand, rules={"min_events": 5}))
        for path in (tmp_path / "ml1m" / "events", plain)
    )
    assert of_file.left_out != {} == of_plain.left_out
    assert of_file.fingerprint == of_plain.fingerprint
    assert of_file.ints.tolist() == of_plain.ints.tolist()


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    rng = random.Random(3)
    rows = []
    for user in range(11):
        for time in range(rng.randint(4, 12)):
            rows.append((user, rng.randrange(9), time, rng.random()))
    path = write_events(tmp_path_factory.mktemp("log") / "events.parquet", rows)
    return path, sequences_by_hand(rows, 4)


def examples_of(batch):
    """Return (user, inputs, targets by position, times) of each sequence; items as numbers."""
    items = batch.ids["item_id"].values().tolist()
    targets = batch.ids["target_item_id"].values().tolist()
    positions = batch.retrieval_positions.tolist()
    found = []
    for b, user in enumerate(batch.user_id.tolist()):
        first, last = batch.offsets[b : b + 2].tolist()
        of = {p - first: t for p, t in zip(positions, targets, strict=True) if first <= p < last}
        times = batch.timestamp[first:last].tolist()
        found.append((user, items[first:last], of, times))
    return found


@pytest.mark.parametrize(("hold_out", "cut"), [("test", 1), ("validation", 2)])
def test_epochs_are_those_of_plain_python(log, hold_out, cut):
    path, by_hand = log
    config = config_of(path, by_hand, rules={"hold_out": hold_out})
    sequences = read_user_sequences(config)
    events = list(by_hand.values())
    number = {item: i for i, item in enumerate(sorted({e[0] for x in events for e in x}))}
    batches = list(LeaveOneOutStream(config, sequences, seed=1))
    orders = []
    for epoch in range(1, EPOCHS + 1):
        trained = [b for b in batches if b.window == epoch and not b.is_frozen]
        scored = [b for b in batches if b.window == epoch and b.is_frozen]
        assert batches.index(trained[-1]) < batches.index(scored[0])
        assert [b.num_sequences for b in trained] == [3, 3, 3, 2]
        assert [b.num_sequences for b in scored] == [4, 4, 3]
        seen = [x for b in trained for x in examples_of(b)]
        orders.append([x[0] for x in seen])
        assert sorted(orders[-1]) == list(range(11))
        for user, items, targets, times in seen:
            # Five of history and the one behind them; the held-out ones are in no training batch.
            kept = events[user][:-cut][-6:]
            assert items == [number[e[0]] for e in kept]
            assert targets == {i - 1: items[i] for i in range(1, len(kept))}
            assert times == [e[1] for e in kept]
        for user, items, targets, _ in [x for b in scored for x in examples_of(b)]:
            kept = events[user][: len(events[user]) - cut + 1][-6:]
            assert items == [number[e[0]] for e in kept]
            assert targets == {len(kept) - 2: items[-1]}
    assert len({tuple(order) for order in orders}) == EPOCHS
    assert orders[0] == [
        x[0] for b in list(LeaveOneOutStream(config, sequences, seed=1))[:4] for x in examples_of(b)
    ]


def test_a_prediction_knows_the_time_of_what_it_predicts(log):
    path, by_hand = log
    config = config_of(path, by_hand)
    batch = next(iter(LeaveOneOutStream(config, read_user_sequences(config), seed=1)))
    for b in range(batch.num_sequences):
        first, last = batch.offsets[b : b + 2].tolist()
        times = batch.timestamp[first:last].tolist()
        assert batch.query_time[first:last].tolist() == [*times[1:], times[-1]]


def same(a, b) -> bool:
    tensors = ("offsets", "timestamp", "query_time", "retrieval_positions", "user_id")
    return (
        all(torch.equal(getattr(a, x), getattr(b, x)) for x in tensors)
        and torch.equal(a.ids.values(), b.ids.values())
        and (a.window, a.is_frozen, a.position) == (b.window, b.is_frozen, b.position)
    )


@pytest.mark.parametrize("every", [1, 2])
def test_any_position_goes_on_as_if_uninterrupted(log, every):
    path, by_hand = log
    config = config_of(path, by_hand, num_negatives=4, rules={"eval_every": every})
    sequences = read_user_sequences(config)
    whole = list(LeaveOneOutStream(config, sequences, seed=1))
    assert sorted({b.window for b in whole if b.is_frozen}) == ([1, 2, 3] if every == 1 else [2, 3])
    assert {b.window for b in whole} == {b.window for b in whole if b.is_frozen}
    for at, batch in enumerate(whole):
        if batch.is_frozen:
            continue
        rest = list(LeaveOneOutStream(config, sequences, seed=1, position=batch.position))
        assert len(rest) == len(whole) - at - 1
        assert all(same(a, b) for a, b in zip(rest, whole[at + 1 :], strict=True))


def test_ranks_share_the_users_of_a_step(log):
    path, by_hand = log
    config = config_of(path, by_hand)
    sequences = read_user_sequences(config)
    alone = list(LeaveOneOutStream(config, sequences, seed=1))
    ranks = [
        list(LeaveOneOutStream(config, sequences, seed=1, rank=r, world_size=2)) for r in (0, 1)
    ]
    for batch, *shares in zip(alone, *ranks, strict=True):
        assert sorted(map(str, examples_of(batch))) == sorted(
            str(x) for share in shares for x in examples_of(share)
        )


def test_negatives_differ_by_epoch(log):
    path, by_hand = log
    config = config_of(path, by_hand, num_negatives=4)
    drawn = defaultdict(set)
    for batch in LeaveOneOutStream(config, read_user_sequences(config), seed=1):
        negatives = batch.ids["negative_item_id"].values().view(-1, 4).tolist()
        for user, row in zip(batch.user_id.tolist(), negatives, strict=True):
            if not batch.is_frozen:
                drawn[user].add(tuple(row))
    assert all(len(rows) == EPOCHS for rows in drawn.values())


def test_actions_and_labels_come_along(log):
    path, by_hand = log
    config = config_of(
        path,
        by_hand,
        layout="interleaved",
        max_history_tokens=10,
        actions={"rating": ActionConfig()},
        tasks={"liked": TaskConfig(action="rating")},
    )
    events = list(by_hand.values())
    for batch in LeaveOneOutStream(config, read_user_sequences(config), seed=1):
        expected = []
        for user in batch.user_id.tolist():
            kept = events[user][-1:] if batch.is_frozen else events[user][:-1][-6:]
            expected += [float(e[2] >= 0.5) for e in kept]
        assert batch.labels["liked"].tolist() == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_items": 5}, r"has 9 items after the filter, data.num_items is 5: set .*=9.* to 10"),
        ({"actions": {"watch": ActionConfig()}}, "has no column watch"),
        ({"log": "/nowhere.parquet"}, "there is no such file"),
    ],
)
def test_a_log_that_does_not_fit_is_refused(log, change, message):
    path, by_hand = log
    with pytest.raises(ValueError, match=message):
        read_user_sequences(config_of(path, by_hand, **change))


def test_null_ids_are_refused(tmp_path):
    path = write_events(tmp_path / "events.parquet", [(1, 2, 3, 0.5), (1, None, 4, 0.5)])
    with pytest.raises(ValueError, match=r"item_id is null in 1 row.*first is row 1"):
        read_user_sequences(config_of(path, {}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"supervise": "session"}, "does not go with data.supervise=session"),
        ({"rules": {"epochs": 0}}, "needs data.leave_one_out.epochs of 1 or more"),
        ({"window": "none"}, "read with data.window=epoch only"),
        ({"sessions_per_partition": 4}, "data.sessions_per_partition=4"),
        ({"item_features": {"seen": COUNTER}}, "data.item_features.seen.counter"),
        ({"rules": {"eval_every": 0}}, "eval_every must be at least 1, got 0"),
    ],
)
def test_settings_of_one_pass_are_refused(log, change, message):
    path, by_hand = log
    with pytest.raises(ValueError, match=message):
        config_of(path, by_hand, **change)
