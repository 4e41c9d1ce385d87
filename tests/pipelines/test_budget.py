"""Batches filled to a budget: each session once, the same steps on all ranks, even loads."""

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.batch import StreamPosition
from pipelines.budget import FULL, LOOK_AHEAD, assign_partitions, plan
from pipelines.config import StochasticLengthConfig
from pipelines.cost import SequenceCost
from pipelines.schedule import make_schedule
from pipelines.stream import SessionStream
from tests.pipelines.logs import MODES, logs, make_config, take_apart
from tests.pipelines.session_log import session, write_log
from tests.pipelines.test_stream import content

FEW = settings(max_examples=6, deadline=None)
COST = SequenceCost(3.0, 2.0, 0.5, 0.25)
SHORT = StochasticLengthConfig(selection="weighted", alpha=1.3)


def filled(folder, mode, **changes):
    return make_config(folder, *mode, sessions_per_partition=8, **changes)


def read(config, **changes):
    return list(SessionStream(config, seed=1, cost=COST, **changes))


def sequences_of(batches, config):
    return Counter(repr(s) for batch in batches for s in take_apart(batch, config))


@pytest.mark.parametrize("mode", [MODES[1], MODES[-1]], ids="-".join)
@given(log=logs(max_partitions=4), fill=st.sampled_from(["tokens", "flops"]), data=st.data())
@FEW
def test_every_session_once_on_any_number_of_ranks(mode, log, fill, data):
    partitions, histories = log
    if not any(partitions):
        return
    with tempfile.TemporaryDirectory() as folder:
        write_log(Path(folder), partitions, histories)
        short = data.draw(st.sampled_from([SHORT, StochasticLengthConfig()]))
        by_rows = make_config(folder, *mode, stochastic_length=short)
        everything = sequences_of(SessionStream(by_rows, seed=1), by_rows)
        budget = data.draw(st.sampled_from([1.0, 25.0, 90.0, 1e6]))
        config = filled(folder, mode, fill=fill, budget=budget, stochastic_length=short)
        alone = read(config)
        for world_size in range(1, len(partitions) + 1):
            ranks = [read(config, rank=r, world_size=world_size) for r in range(world_size)]
            assert sum((sequences_of(b, config) for b in ranks), Counter()) == everything
            for shares in zip(*ranks, strict=True):
                assert len({share.position for share in shares}) == 1
                assert len({share.window for share in shares}) == 1
                for share in shares:
                    sessions = {
                        (int(p), int(s))
                        for p, s in zip(share.partition, share.session_id, strict=True)
                    }
                    if fill == "tokens" and len(sessions) > 1:
                        assert share.num_tokens <= budget
            # A stop in between, and another number of ranks from there on.
            stop = data.draw(st.integers(0, len(alone) - 1))
            begun = alone[: stop + 1]
            rest = [
                b
                for r in range(world_size)
                for b in read(config, rank=r, world_size=world_size, position=begun[-1].position)
            ]
            assert sequences_of(begun + rest, config) == everything


@given(log=logs(max_partitions=3), data=st.data())
@settings(FEW, max_examples=3)
def test_resume_at_every_step_is_bit_identical(log, data):
    partitions, histories = log
    if not any(partitions):
        return
    with tempfile.TemporaryDirectory() as folder:
        write_log(Path(folder), partitions, histories)
        budget = data.draw(st.sampled_from([20.0, 40.0]))
        config = filled(folder, MODES[0], fill="tokens", budget=budget, stochastic_length=SHORT)
        for world_size in {1, len(partitions)}:
            whole = read(config, rank=0, world_size=world_size)
            for done, batch in enumerate(whole, start=1):
                rest = read(config, rank=0, world_size=world_size, position=batch.position)
                assert [content(b) for b in rest] == [content(b) for b in whole[done:]]


def test_segments_are_planned_one_after_another(tmp_path):
    calm_log(tmp_path / "2024-01")
    calm_log(tmp_path / "2024-02", first=60, histories=False)
    calm_log(tmp_path / "2024-03", first=120, histories=False)
    changes = {"fill": "tokens", "budget": 150.0, "window": "none", "max_history_tokens": 40}
    config = filled(tmp_path, MODES[0], stochastic_length=SHORT, **changes)
    whole = read(config)
    assert 140 < max(batch.num_tokens for batch in whole) <= 150  # users are known from before
    assert whole[-1].position.rows == (180, 180)
    sessions = [int(s) for batch in whole for s in batch.session_id]
    assert set(sessions) == set(range(180))
    expected = [content(b) for b in whole]
    begun = [batch.position.segments for batch in whole]
    assert begun == sorted(begun)
    assert begun[-1] == ("2024-01", "2024-02", "2024-03")
    # Around each change of segment, and now and then between.
    changes_at = {i + d for i in range(1, len(begun)) if begun[i] != begun[i - 1] for d in (0, 1)}
    for done in sorted({1, len(whole), *changes_at, *range(4, len(whole), 40)}):
        stop = whole[done - 1].position
        assert [content(b) for b in read(config, position=stop)] == expected[done:]
        two = [b for r in range(2) for b in read(config, rank=r, world_size=2, position=stop)]
        assert sequences_of(whole[:done] + two, config) == sequences_of(whole, config)


def test_a_frozen_window_opens_once(tmp_path):
    calm_log(tmp_path)
    changes = {"fill": "tokens", "budget": 150.0, "window": "hour"}
    config = filled(tmp_path, MODES[0], **changes)
    whole = read(config, frozen=True)
    scored = [b for b in whole if b.is_frozen]
    trained = [b for b in whole if not b.is_frozen]
    assert len(scored) == len(trained) > 10
    ids = [sorted(int(s) for b in batches for s in b.session_id) for batches in (scored, trained)]
    assert ids[0] == ids[1]
    done = next(i for i, b in enumerate(whole) if not b.is_frozen) + 1
    rest = read(config, frozen=True, position=whole[done - 1].position)
    assert [content(b) for b in rest] == [content(b) for b in whole[done:]]


def fill_by_hand(partition, cost, budget):
    """Return the steps, each a list of sessions, by lists instead of flags."""
    left, steps = list(range(len(cost))), []
    while left:
        taken, waiting, tried = [], set(), 0
        for i in left:
            if sum(cost[j] for j in taken) >= FULL * budget or tried >= LOOK_AHEAD:
                break
            tried += tried > 0
            if partition[i] in waiting:
                continue
            if not taken or sum(cost[j] for j in taken) + cost[i] <= budget:
                taken.append(i)
            else:
                waiting.add(partition[i])
                tried = max(tried, 1)
        left = [i for i in left if i not in taken]
        steps.append(taken)
    return steps


@given(
    sessions=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(0, 60)), max_size=40
    ),
    budget=st.sampled_from([1, 30, 64, 200]),
    world_size=st.sampled_from([1, 2, 4]),
)
@settings(FEW, max_examples=80)
def test_the_plan_is_that_of_lists(sessions, budget, world_size):
    by_partition = [sorted((t, c) for q, t, c in sessions if q == p) for p in range(4)]
    end_ts = [np.array([t for t, _ in rows], np.int64) for rows in by_partition]
    costs = [np.array([float(c) for _, c in rows]) for rows in by_partition]
    hours = [times * 300 for times in end_ts]
    schedule = make_schedule(hours, window="hour", offset_seconds=0, sessions_per_partition=8)
    start = StreamPosition((0,) * 4, 0)
    owned = assign_partitions(costs, world_size)
    assert sorted(p for mine in owned for p in mine) == [0, 1, 2, 3]
    assert all(mine == sorted(mine) != [] for mine in owned)
    found = plan(schedule, hours, costs, budget=budget, owned=owned, start=start)
    expected = [np.zeros(4, int)]
    for window in sorted({t * 300 // 3600 for times in end_ts for t in times.tolist()}):
        ranks = []
        for partitions in owned:
            mine = [
                (t, p, c)
                for p in partitions
                for t, c in zip(end_ts[p].tolist(), costs[p].tolist(), strict=True)
                if t * 300 // 3600 == window
            ]
            mine.sort(key=lambda each: each[:2])
            steps = fill_by_hand([p for _, p, _ in mine], [c for *_, c in mine], budget)
            ranks.append([[mine[i][1] for i in step] for step in steps])
        for s in range(max(len(steps) for steps in ranks)):
            taken = [p for steps in ranks for p in (steps[s] if s < len(steps) else [])]
            expected.append(expected[-1] + np.bincount(np.array(taken, int), minlength=4))
    assert found.rows.tolist() == [row.tolist() for row in expected]
    assert found.num_steps == len(expected) - 1


def calm_log(folder, *, first=0, histories=True):
    """Write sessions of users that never have two at a time, and their starting histories."""
    rng = np.random.default_rng(first)
    partitions, starts = [], []
    for p in range(2):
        rows = []
        for number in range(first, first + 60):
            events = [
                {"t": 100 * number + i, "item": 1, "click": True}
                for i in range(int(rng.integers(1, 9)))
            ]
            rows.append(session(4 * int(rng.integers(0, 5)) + p, number, events))
        partitions.append(rows)
        starts.append(
            [session(4 * u + p, -1, [{"t": 0, "item": 2}] * (3 * u)) for u in range(1, 5)]
        )
    write_log(folder, partitions, starts if histories else None)


@pytest.mark.parametrize("mode", MODES[:8], ids="-".join)
def test_costs_are_exact_where_sessions_do_not_overlap(tmp_path, mode):
    calm_log(tmp_path)
    config = filled(
        tmp_path, mode, fill="tokens", budget=150.0, window="none", max_history_tokens=40,
        stochastic_length=StochasticLengthConfig(selection="random", alpha=1.6),
    )  # fmt: skip
    tokens = [batch.num_tokens for batch in read(config)]
    assert 140 < max(tokens) <= 150
    assert np.mean(tokens[:-1]) > 110
    one_each = filled(tmp_path, mode, fill="tokens", budget=1.0, window="none")
    batches = read(one_each)
    assert [b.num_sessions for b in batches] == [1] * 120


def zipf_log(num_sessions=200_000, num_users=20_000, num_partitions=64):
    """Return end_ts and costs by partition; the lengths of users follow Zipf's law."""
    rng = np.random.default_rng(0)
    length = np.minimum(20 * rng.zipf(1.5, num_users), 4096)
    user = rng.integers(0, num_users, num_sessions)
    end_ts = np.sort(rng.integers(0, 86_400, num_sessions))
    cost = length[user] * 1000.0 + length[user].astype(float) ** 2
    owner = rng.integers(0, num_partitions, num_users)[user]
    pick = [owner == p for p in range(num_partitions)]
    return [end_ts[m] for m in pick], [cost[m] for m in pick]


def test_ranks_bear_the_same_load():
    end_ts, costs = zipf_log()
    ranks = 8
    schedule = make_schedule(end_ts, window="none", offset_seconds=0, sessions_per_partition=8)
    budget = np.concatenate(costs).mean() * 8 * 64 / ranks
    start = StreamPosition((0,) * 64, 0)
    owned = assign_partitions(costs, ranks)
    planned = plan(schedule, end_ts, costs, budget=budget, owned=owned, start=start)
    until = [np.concatenate([[0.0], np.cumsum(c)]) for c in costs]

    def loads(rows, owned):
        of_partition = np.diff([[until[p][row[p]] for p in range(64)] for row in rows], axis=0)
        return np.stack([of_partition[:, mine].sum(1) for mine in owned], axis=1)

    in_turn = [range(r, 64, ranks) for r in range(ranks)]
    by_rows = loads([schedule.rows_at(s) for s in range(schedule.num_steps + 1)], in_turn)
    by_cost = loads(planned.rows, owned)
    assert by_cost.max() <= budget
    last_full = int((by_cost > 0).all(1).nonzero()[0][-1])  # the first rank ends with this step
    full = by_cost[:last_full]
    assert len(full) > 0.9 * len(by_cost)
    assert (full.max(1) / full.mean(1)).max() < 1.05
    assert by_cost.max(1).sum() / by_cost.mean(1).sum() < 1.05
    assert np.median(by_rows.max(1) / by_rows.mean(1)) > 1.4
    assert by_cost.max(1).sum() < 0.75 * by_rows.max(1).sum()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fill": "tokens"}, "need a positive budget"),
        ({"budget": 5.0}, "fill=sessions reads none"),
        ({"fill": "flops", "budget": 5.0, "sessions_per_partition": 3}, "is not read with"),
        (
            {"fill": "flops", "budget": 5.0, "stochastic_length": {"balance": True}},
            "use one of them",
        ),
        ({"stochastic_length": {"balance": True, "recalibrate_steps": 2}}, "above data.prefetch"),
    ],
)
def test_settings_that_contradict_each_other(tmp_path, changes, message):
    if "stochastic_length" in changes:
        lengths = StochasticLengthConfig(selection="greedy", **changes["stochastic_length"])
        changes = changes | {"stochastic_length": lengths}
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, *MODES[0], **({"sessions_per_partition": 8} | changes))


def test_a_position_of_another_log_is_refused(tmp_path):
    calm_log(tmp_path)
    config = filled(tmp_path, MODES[0], fill="tokens", budget=150.0)
    for rows in ((0, 61), (60,), (-1, 3), (0, 60)):
        with pytest.raises(ValueError, match=r"position: .* of this log"):
            SessionStream(config, seed=1, position=StreamPosition(rows, 2))
