"""Decayed counters against sums over lists, one event at a time; the sequences by the oracle."""

import copy
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.config import FeatureConfig
from pipelines.stream import SessionStream, Snapshots
from tests.pipelines.logs import MERGED_MODES, MODES, content, logs, make_config, take_apart
from tests.pipelines.oracle import Oracle, reject_reason
from tests.pipelines.session_log import session, write_log

FEW = settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
COUNTERS = {
    "user_events": FeatureConfig(counter="user", half_life_hours=1.0, encoding="zscore"),
    "user_watch": FeatureConfig(
        counter="user", half_life_hours=0.001, column="watch", encoding="quantile", bins=4
    ),
    "item_clicks": FeatureConfig(
        counter="item", half_life_hours=0.2, column="click", encoding="zscore"
    ),
    "both": FeatureConfig(counter="user_item", half_life_hours=24.0, encoding="zscore"),
}
PLAIN = {name: replace(f, counter="none", half_life_hours=0.0) for name, f in COUNTERS.items()}


@pytest.fixture(autouse=True)
def small_blocks_and_sums(monkeypatch):
    """Make blocks small, and sums of what lies before the frontier as early as can be."""
    monkeypatch.setattr("pipelines.partition.ROWS_PER_BLOCK", 3)
    monkeypatch.setattr("pipelines.decayed_counters.OVERHANG_SECONDS", 0)


def counters_config(folder, mode, **changes):
    features = {"tab": FeatureConfig(), **COUNTERS}
    return make_config(folder, *mode, item_features=features, window="none", **changes)


def with_counters(partitions, histories, config):
    """Return the log with a column for each counter, in its events."""
    partitions, histories = copy.deepcopy(partitions), copy.deepcopy(histories or [])
    for p, rows in enumerate(partitions):
        seen = []  # user, event
        for row in histories[p] if histories else []:
            if reject_reason(row, config) is None:
                seen += [(row["user_id"], event) for event in row["events"]]
        for row in rows:
            if reject_reason(row, config) is not None:
                continue
            size = config.max_session_events
            for first in range(0, len(row["events"]), size):
                piece = row["events"][first : first + size]
                anchor = row["start_ts"] if first == 0 else piece[0]["timestamp"]
                for event in piece:
                    time = anchor if config.anchor == "session" else event["timestamp"]
                    past = [(u, e) for u, e in seen if e["timestamp"] < time]
                    event.update(
                        {
                            name: math.fsum(
                                weight(e.get(feature.column) if feature.column else 1)
                                * 0.5 ** ((time - e["timestamp"]) / feature.half_life_hours / 3600)
                                for u, e in past
                                if feature.counter == "item" or u == row["user_id"]
                                if feature.counter == "user" or e["item_id"] == event["item_id"]
                            )
                            for name, feature in COUNTERS.items()
                        }
                    )
                    seen.append((row["user_id"], event))
    return partitions, histories or None


def weight(value):
    return 0.0 if value is None or math.isnan(value) else float(value)


@pytest.mark.parametrize("mode", [MODES[0], MODES[2], MODES[-1], MERGED_MODES[0]], ids="-".join)
@given(log=logs(), most=st.integers(1, 4), longest=st.sampled_from([10**6, 3000]))
@FEW
def test_counters_are_sums_over_what_was_before(mode, log, most, longest):
    partitions, histories = log
    if not any(partitions):
        return
    for rows in partitions:  # few items, so that they come again
        for row in rows:
            for event in row["events"] or []:
                if event and (event["item_id"] or 0) > 0:
                    event["item_id"] %= 3
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.decayed_counters.LONGEST_SECONDS", longest)
        write_log(Path(folder), partitions, histories)
        config = counters_config(folder, mode, max_session_events=most)
        batches = list(SessionStream(config, seed=5))
    plain = replace(config, item_features={"tab": FeatureConfig(), **PLAIN})
    plain = replace(
        plain,
        item_features={
            name: replace(f, column=name) if name in PLAIN else f
            for name, f in plain.item_features.items()
        },
    )
    oracle = Oracle(plain, *with_counters(partitions, histories, config), seed=5)
    num_found = 0
    for batch, (_, _, sequences, _) in zip(batches, oracle.steps(), strict=True):
        for found, expected in zip(take_apart(batch, config), sequences, strict=True):
            assert found["item_id"] == expected["item_id"]
            assert found["timestamp"] == expected["timestamp"]
            for name in COUNTERS:
                ours, right = found["item_features"][name], expected["item_features"][name]
                for value, wanted in zip(ours, right, strict=True):
                    if value is None and wanted is not None:
                        # Missing is allowed where a session is longer than sums wait for.
                        assert longest == 3000
                        continue
                    assert value == (wanted and pytest.approx(wanted, rel=2e-6, abs=1e-30))
                    num_found += value is not None
    assert num_found or not any(b.num_sequences for b in batches) or longest == 3000


@given(log=logs(max_partitions=2, max_sessions=6), data=st.data())
@settings(FEW, max_examples=2)
def test_resumed_counters_are_those_of_one_pass(log, data):
    partitions, histories = log
    if not any(partitions):
        return
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "log")
        write_log(folder, partitions, histories)
        mode = data.draw(st.sampled_from([MODES[0], MODES[2]]))
        config = counters_config(folder, mode, sessions_per_partition=1)
        saved = Snapshots(Path(root, "saved"), is_due=lambda step: True)
        whole = list(SessionStream(config, seed=1, snapshots=saved))
        for done, batch in enumerate(whole, start=1):
            for made in (saved.path(done), None):
                rest = SessionStream(config, seed=1, position=batch.position, histories=made)
                assert [content(b) for b in rest] == [content(b) for b in whole[done:]]
        saved.path(1).joinpath("counters-00000.arrow").unlink()
        rest = SessionStream(config, seed=1, position=whole[0].position, histories=saved.path(1))
        with pytest.raises(ValueError, match=r"counters-00000\.arrow is missing"):
            next(iter(rest))


def fading_log(folder, times, lengths=None):
    rows = [
        session(7, n, [{"t": t, "item": 1, "click": True}] * (lengths or {}).get(n, 1))
        for n, t in enumerate(times)
    ]
    write_log(folder, [rows])
    return rows


def values(config, name, **changes):
    batches = SessionStream(config, seed=0, **changes)
    return [
        value
        for batch in batches
        for found in take_apart(batch, config)
        for value in found["item_features"][name]
    ]


def test_each_half_life_halves_for_good(tmp_path):
    hours = [0, 1, 2, 2000, 2001, 5000]
    fading_log(tmp_path, [3600 * h for h in hours])
    config = counters_config(tmp_path, MODES[0], max_history_tokens=0)
    assert values(config, "user_events") == [0.0, 0.5, 0.75, 0.0, 0.5, 0.0]


def test_a_scored_window_counts_nothing_of_itself_afterwards(tmp_path):
    fading_log(tmp_path, [100, 3700, 3800, 3900, 7300], lengths={2: 2})
    config = replace(counters_config(tmp_path, MODES[0], max_history_tokens=0), window="hour")
    batches = list(SessionStream(config, seed=0, frozen=True))
    scored = [b for b in batches if b.is_frozen]
    of = lambda b: [round(x, 4) for x in b.numbers["user_events"].tolist()]  # noqa: E731
    # Of the second hour each session sees the first hour, and itself.
    ages = [3600, 3700, 3700, 3800]
    seen = [x for b in scored for x in of(b)][1:5]
    assert seen == [round(0.5 ** (age / 3600), 4) for age in ages]
    learnt = [content(b) for b in batches if not b.is_frozen]
    assert learnt == [content(b) for b in SessionStream(config, seed=0)]


def test_a_session_before_the_sums_is_missing_not_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.decayed_counters.LONGEST_SECONDS", 50)
    rows = [session(7, n, [{"t": 100 * n, "item": 1}]) for n in range(1, 5)]
    long = session(8, 9, [{"t": 150, "item": 1}, {"t": 401, "item": 1}])
    write_log(tmp_path, [[*rows, long]])
    config = counters_config(tmp_path, MODES[2], max_history_tokens=0)
    config = replace(config, item_features={"n": replace(COUNTERS["item_clicks"], column="")})
    assert values(config, "n")[-2:] == [None, None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"half_life_hours": 0.0}, "n has counter=user and half_life_hours=0.0: a counter needs"),
        ({"counter": "none"}, "half_life_hours=1.0"),
        ({"encoding": "id"}, "n.counter is a number that each event has"),
    ],
)
def test_wrong_counters_are_refused(changes, message):
    feature = replace(COUNTERS["user_events"], **changes)
    with pytest.raises(ValueError, match=message):
        make_config("none", *MODES[0], item_features={"n": feature})
    with pytest.raises(ValueError, match=r"context_features\.n\.counter"):
        make_config("none", *MODES[0], context_features={"n": COUNTERS["user_events"]})


def test_a_column_to_sum_must_be_there(tmp_path):
    fading_log(tmp_path, [1])
    feature = replace(COUNTERS["item_clicks"], column="clik")
    config = make_config(tmp_path, *MODES[0], item_features={"n": feature})
    with pytest.raises(ValueError, match=r"data.item_features.n needs the column 'clik'"):
        SessionStream(config, seed=0)
