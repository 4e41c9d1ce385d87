import tempfile
import threading
import time
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.batch import StreamPosition
from pipelines.config import FeatureConfig, StochasticLengthConfig
from pipelines.stream import SessionStream
from tests.pipelines.logs import (
    MERGED_MODES,
    MODES,
    RICH,
    SEED,
    as_float32,
    content,
    logs,
    make_config,
    take_apart,
)
from tests.pipelines.oracle import Oracle
from tests.pipelines.session_log import SCHEMA, session, write_log

FEW = settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
FADING = {
    f"fading_{key}": FeatureConfig(
        counter=key, half_life_hours=0.5, column="click", encoding="zscore"
    )
    for key in ("user", "item")
}
SOME = settings(FEW, max_examples=16)


def lengths(max_history_tokens):
    """Draw settings of stochastic length."""
    settings = st.builds(
        StochasticLengthConfig,
        selection=st.sampled_from(["greedy", "random", "weighted"]),
        alpha=st.sampled_from([1.2, 1.6, 2.0]),
        max_length=st.integers(0, 12),
    )
    none = st.just(StochasticLengthConfig())
    return none | settings if max_history_tokens else none


@pytest.fixture(autouse=True)
def small_blocks_and_regions(monkeypatch):
    """Make blocks and regions so small that the drawn logs cross their bounds."""
    monkeypatch.setattr("pipelines.partition.ROWS_PER_BLOCK", 3)
    monkeypatch.setattr("pipelines.stream.EXTRA_ROWS", 2)


@pytest.mark.parametrize("mode", [*MODES, *MERGED_MODES], ids="-".join)
@given(log=logs(), history=st.integers(0, 9), sessions=st.integers(1, 3), data=st.data())
@FEW
def test_stream_equals_oracle(mode, log, history, sessions, data):
    partitions, histories = log
    if not any(partitions):
        return
    # A bag of the context needs a token.
    rich = mode[3] != "none" and data.draw(st.booleans(), label="rich")
    with tempfile.TemporaryDirectory() as folder:
        write_log(Path(folder), partitions, histories)
        config = make_config(
            folder,
            *mode,
            max_history_tokens=history,
            sessions_per_partition=sessions,
            max_session_events=data.draw(st.integers(1, 5)),
            overlap_slack=data.draw(st.integers(0, 3)),
            window=data.draw(st.sampled_from(["none", "hour", "day"])),
            window_offset_seconds=data.draw(st.sampled_from([0, -3602])),
            positive=data.draw(st.sampled_from([(), ("click",), ("click", "watch")])),
            num_negatives=data.draw(st.sampled_from([0, 3])),
            stochastic_length=data.draw(lengths(history)),
            **(RICH if rich else {}),
        )
        rejects = []
        stream = SessionStream(config, seed=SEED, on_reject=rejects.append)
        batches = list(stream)
    oracle = Oracle(config, partitions, histories, seed=SEED)
    expected_steps = list(oracle.steps())
    assert len(batches) == stream.num_steps == len(expected_steps)
    expected_rejects = []
    for step, (batch, (window, rows, sequences, refused)) in enumerate(
        zip(batches, expected_steps, strict=True)
    ):
        found = [as_float32(s) for s in take_apart(batch, config)]
        clipped = sum(s.pop("clipped") for s in sequences)
        num_events = sum(s.pop("num_events") for s in sequences)
        num_cut = sum(s.pop("num_cut") for s in sequences)
        assert found == [as_float32(s) for s in sequences]
        assert batch.window == window
        assert batch.position == StreamPosition(rows, step + 1)
        assert batch.num_clipped == clipped
        assert batch.num_events == num_events
        assert batch.num_cut_bags == num_cut
        assert batch.num_rejected == Counter(reason for *_, reason in refused)
        assert batch.max_len == max((len(s["kind"]) for s in sequences), default=0)
        expected_rejects += refused
    # Sessions of which nothing is known share a line.
    told = [(r.partition, r.row + i, r.reason) for r in rejects for i in range(r.num_sessions)]
    assert told == expected_rejects


@pytest.mark.parametrize("mode", [MODES[0], MODES[3], MODES[-1]], ids="-".join)
@given(log=logs(max_partitions=3))
@settings(FEW, max_examples=4)
def test_resume_at_every_step_is_bit_identical(mode, log):
    partitions, histories = log
    if not any(partitions):
        return
    with tempfile.TemporaryDirectory() as folder:
        write_log(Path(folder), partitions, histories)
        short = StochasticLengthConfig(selection="weighted", alpha=1.3)
        config = make_config(folder, *mode, sessions_per_partition=1, stochastic_length=short)
        for world_size in range(1, len(partitions) + 1):
            for rank in range(world_size):
                whole = list(SessionStream(config, seed=1, rank=rank, world_size=world_size))
                for done, batch in enumerate(whole, start=1):
                    rest = SessionStream(
                        config, seed=1, rank=rank, world_size=world_size, position=batch.position
                    )
                    assert [content(b) for b in rest] == [content(b) for b in whole[done:]]


@given(log=logs(max_partitions=5))
@FEW
def test_global_batch_does_not_depend_on_the_number_of_ranks(log):
    partitions, histories = log
    if not any(partitions):
        return
    with tempfile.TemporaryDirectory() as folder:
        write_log(Path(folder), partitions, histories)
        short = StochasticLengthConfig(selection="random", alpha=1.3)
        config = make_config(folder, *MODES[1], stochastic_length=short)
        alone = list(SessionStream(config, seed=1))
        for world_size in {min(2, len(partitions)), len(partitions)}:
            ranks = [
                list(SessionStream(config, seed=1, rank=r, world_size=world_size))
                for r in range(world_size)
            ]
            for step, batch in enumerate(alone):
                shares = [batches[step] for batches in ranks]
                union = [repr(s) for share in shares for s in take_apart(share, config)]
                assert sorted(union) == sorted(repr(s) for s in take_apart(batch, config))
                assert all(share.position == batch.position for share in shares)
                assert all(share.window == batch.window for share in shares)
                for r, share in enumerate(shares):
                    assert all(p % world_size == r for p in share.partition.tolist())


def test_empty_share_has_the_shapes_of_a_full_one(tmp_path):
    rows = [session(3, 0, [{"t": 5, "item": 1, "click": True}, {"t": 6, "item": 2, "click": True}])]
    write_log(tmp_path, [rows, []])
    config = make_config(tmp_path, *MODES[1])
    (full,) = SessionStream(config, seed=0, rank=0, world_size=2)
    (empty,) = SessionStream(config, seed=0, rank=1, world_size=2)
    assert (full.num_sequences, empty.num_sequences, empty.num_tokens) == (1, 0, 0)
    assert empty.ids.keys() == full.ids.keys()
    for name in (f.name for f in fields(full) if isinstance(getattr(full, f.name), torch.Tensor)):
        expected, found = getattr(full, name), getattr(empty, name)
        assert found.dtype == expected.dtype
        assert found.shape == (1 if name == "offsets" else 0, *expected.shape[1:])
    for key in full.ids.keys():  # noqa: SIM118
        assert empty.ids[key].values().dtype == empty.ids[key].lengths().dtype == torch.int64
        assert empty.ids[key].values().numel() == 0
    assert empty.labels.keys() == full.labels.keys()
    assert empty.position == full.position


@given(mode=st.sampled_from(MODES[:8]), log=logs(defects=False))
@SOME
def test_each_event_is_supervised_exactly_once(mode, log):
    partitions, histories = log
    events = [e for rows in partitions for row in rows for e in row["events"]]
    if not events:
        return
    for number, event in enumerate(events):  # so that an item names its event
        event["item_id"] = 1000 + number
    with tempfile.TemporaryDirectory() as folder:
        write_log(Path(folder), partitions, histories)
        config = make_config(folder, *mode, positive=(), max_session_events=2)
        ranked, retrieved = Counter(), Counter()
        unpreceded = 0
        for batch in SessionStream(config, seed=0):
            for sequence in take_apart(batch, config):
                head = sequence["num_context"]
                item_of_token, items = {}, iter(sequence["item_id"])
                for t, kind in enumerate(sequence["kind"]):
                    if kind in (1, 3, 4):
                        item_of_token[t] = next(items)
                ranked.update(item_of_token[p] for p, *_ in sequence["ranking"])
                retrieved.update(item for _, item in sequence["retrieval"])
                in_session = len([t for t in item_of_token if t >= sequence["session_start"]])
                if sequence["session_start"] == head:  # no history: nothing to predict from
                    unpreceded += in_session if mode[1] == "session" else 1
    if config.tasks:
        assert ranked == Counter(range(1000, 1000 + len(events)))
    assert max(retrieved.values(), default=1) == 1
    assert len(retrieved) == len(events) - unpreceded


def disturbed(rows, moment):
    """Return rows in which all but the times of events from `moment` on is changed."""

    def other(event):
        if event["timestamp"] < moment:
            return event
        return event | {
            "item_id": 49 - event["item_id"],
            "click": not event["click"],
            "watch": 7.0,
            "tab": (event["tab"] or 0) + 1,
            "price": 9.0,
            "seen": 9.0,
            "genres": [0, 1],
        }

    def other_context(row):
        if row["start_ts"] < moment:
            return row["context"]
        known = row["context"] or {"country": None}
        return {"country": (known["country"] or 0) + 1, "age": 99.0, "creators": [3]}

    return [
        row | {"events": [other(e) for e in row["events"]], "context": other_context(row)}
        for row in rows
    ]


@given(
    mode=st.sampled_from([*MODES, *MERGED_MODES]),
    log=logs(defects=False),
    moment=st.sampled_from([2, 6, 7, 8, 9, 3601, 3606]),
)
@SOME
def test_no_event_reaches_what_is_before_it(mode, log, moment):
    partitions, histories = log
    if not any(partitions):
        return
    histories = histories or [[] for _ in partitions]
    seen = []
    for change in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            tables = [
                [disturbed(rows, moment) if change else rows for rows in table]
                for table in (partitions, histories)
            ]
            write_log(Path(folder), *tables)
            rich = RICH if mode[3] != "none" else {}
            features = rich.get("item_features", {"tab": FeatureConfig()}) | FADING
            config = make_config(folder, *mode, positive=(), **(rich | {"item_features": features}))
            seen.append([s for b in SessionStream(config, seed=0) for s in take_apart(b, config)])
    assert len(seen[0]) == len(seen[1])
    for before, after in zip(*seen, strict=True):
        # Tokens, and what is read at them about events before the moment.
        assert known_before(before, moment) == known_before(after, moment)


def known_before(sequence, moment):
    """Return what of a sequence was known before `moment`, by the times of its tokens."""
    candidates = sequence["num_candidates"]
    own = len(sequence["kind"]) - candidates
    context = sequence["num_context"]
    num_tokens = sum(t < moment for t in sequence["timestamp"][context:own])
    num_events = sum(kind in (1, 3) for kind in sequence["kind"][: context + num_tokens])
    series = {
        name: [x for x in v if isinstance(x, tuple)] for name, v in sequence["context"].items()
    }
    if any(series.values()):
        known = {name: [x for x in v if x[0] < num_tokens] for name, v in series.items()}
        retrieval = [p for p, _ in sequence["retrieval"] if p + 1 < num_tokens]
    else:
        starts = sequence["timestamp"][sequence["session_start"]]
        known = sequence["context"] if starts < moment else None
        retrieval = [p for p, _ in sequence["retrieval"]]
    anchor = sequence["timestamp"][own] if candidates else None
    return {
        "tokens": list(
            zip(sequence["kind"], sequence["timestamp"], sequence["query_time"], strict=True)
        )[: context + num_tokens],
        "context": known,
        "items": sequence["item_id"][:num_events],
        "features": [ids[:num_events] for ids in sequence["item_features"].values()],
        "codes": sequence["action_codes"][:num_events],
        "ranking": [repr(r) for r in sequence["ranking"] if r[0] < context + num_tokens],
        "retrieval": retrieval,
        "anchor": anchor,
        "negatives": sequence["negatives"],
    }


@given(log=logs(defects=False), mode=st.sampled_from([*MODES, *MERGED_MODES]))
@FEW
def test_times_ascend_up_to_the_anchor(log, mode):
    partitions, histories = log
    if not any(partitions):
        return
    with tempfile.TemporaryDirectory() as folder:
        write_log(Path(folder), partitions, histories)
        config = make_config(folder, *mode)
        for batch in SessionStream(config, seed=0):
            for sequence in take_apart(batch, config):
                head, start = sequence["num_context"], sequence["session_start"]
                times = sequence["timestamp"]
                assert times[head:] == sorted(times[head:])
                assert all(t < times[start] for t in times[head:start])
                queries = sequence["query_time"][head:]
                assert all(t <= q for t, q in zip(times[head:], queries, strict=True))
                assert set(times[:head]) <= {times[start]}


def one_user_log(folder, num_sessions=12):
    rows = [
        session(3, n, [{"t": 10 * n + 1, "item": n, "click": True, "watch": 1.0}])
        for n in range(num_sessions)
    ]
    write_log(folder, [rows])
    return rows


def test_negatives_depend_on_user_session_and_seed_only(tmp_path):
    one_user_log(tmp_path)
    by_size = []
    for sessions in (1, 5):
        config = make_config(
            tmp_path, *MODES[0], sessions_per_partition=sessions, window="none", num_negatives=40
        )
        drawn = [b.ids["negative_item_id"].values() for b in SessionStream(config, seed=3)]
        by_size.append(torch.cat(drawn))
    assert torch.equal(*by_size)
    other_seed = torch.cat(
        [b.ids["negative_item_id"].values() for b in SessionStream(config, seed=4)]
    )
    assert (by_size[0] != other_seed).float().mean() > 0.9
    assert set(by_size[0].tolist()) == set(range(config.num_items))  # 480 draws of 50 items
    sessions_agree = (by_size[0].view(12, 40)[0] == by_size[0].view(12, 40)[1]).float().mean()
    assert sessions_agree < 0.3


def test_sampled_keeps_about_k_of_n(tmp_path):
    rows = [[session(u, 0, [{"t": 1, "item": i} for i in range(4)]) for u in range(4000)]]
    write_log(tmp_path, rows, row_group_size=4000)
    config = make_config(tmp_path, *MODES[-1], sessions_per_partition=4000, max_session_events=9)
    (batch,) = SessionStream(config, seed=0)
    assert 0.46 < batch.num_sequences / 4000 < 0.54  # k / n = 2 / 4; the deviation is 0.008


def test_prefetched_batches_are_the_same(tmp_path):
    one_user_log(tmp_path)
    ahead, inline = (
        [content(b) for b in SessionStream(make_config(tmp_path, *MODES[0], prefetch=n), seed=0)]
        for n in (2, 0)
    )
    assert ahead == inline
    assert len(ahead) == 6


def test_dropping_the_iterator_ends_the_thread(tmp_path):
    one_user_log(tmp_path)
    before = threading.active_count()
    iterator = iter(SessionStream(make_config(tmp_path, *MODES[0], prefetch=1), seed=0))
    next(iterator)
    assert threading.active_count() == before + 1
    iterator.close()
    assert threading.active_count() == before
    iterator = iter(SessionStream(make_config(tmp_path, *MODES[0], prefetch=1), seed=0))
    next(iterator)
    del iterator
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


@pytest.mark.parametrize("prefetch", [0, 2])
def test_too_many_rejects_stop_the_pass(tmp_path, prefetch):
    rows = one_user_log(tmp_path)
    for n in (2, 9, 10):
        rows[n]["events"][0]["item_id"] = None
    write_log(tmp_path, [rows])
    config = make_config(tmp_path, *MODES[0], prefetch=prefetch, max_reject_fraction=0.2)
    rejects, batches = [], []
    stream = SessionStream(config, seed=0, on_reject=rejects.append)
    with pytest.raises(ValueError, match=r"part-00000.parquet: 3 of 12 sessions .* row 10\."):
        batches.extend(stream)
    assert [(r.row, r.user_id, r.session_id) for r in rejects] == [(2, 3, 2), (9, 3, 9)]
    assert len(batches) == 5
    fits = make_config(tmp_path, *MODES[0], prefetch=prefetch, max_reject_fraction=0.25)
    assert sum(sum(b.num_rejected.values()) for b in SessionStream(fits, seed=0)) == 3


def test_rejects_before_the_position_count_but_are_not_reported_again(tmp_path):
    rows = one_user_log(tmp_path)
    rows[0]["events"][0]["item_id"] = None
    rows[11]["events"][0]["item_id"] = -1
    write_log(tmp_path, [rows])
    config = make_config(tmp_path, *MODES[0])
    position = next(iter(SessionStream(config, seed=0))).position
    rejects = []
    list(SessionStream(config, seed=0, position=position, on_reject=rejects.append))
    assert [r.row for r in rejects] == [11]
    strict = make_config(tmp_path, *MODES[0], max_reject_fraction=0.1)
    with pytest.raises(ValueError, match="2 of 12 sessions"):
        list(SessionStream(strict, seed=0, position=position))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"positive": ("clik",)},
            "data.positive needs the column 'clik', which .*part-00000.parquet",
        ),
        (
            {"item_features": {"x": {"column": "nope"}}},
            "data.item_features.x needs the column 'nope'",
        ),
        ({"context_features": {"x": {"column": "tab"}}}, "context columns .'age', 'country'."),
        ({"item_features": {"price": {}}}, "must be an integer or bool column, found double"),
    ],
)
def test_wrong_columns_are_named(tmp_path, changes, message):
    one_user_log(tmp_path)
    changes = {
        group: {k: FeatureConfig(**v) for k, v in value.items()}
        if isinstance(value, dict)
        else value
        for group, value in changes.items()
    }
    with pytest.raises(ValueError, match=message):
        SessionStream(make_config(tmp_path, *MODES[0], **changes), seed=0)


def test_wrong_logs_are_named(tmp_path):
    config = make_config(tmp_path / "none", *MODES[0])
    with pytest.raises(ValueError, match="there is no such folder"):
        SessionStream(config, seed=0)
    write_log(tmp_path / "none", [[], []])
    with pytest.raises(ValueError, match="holds no sessions"):
        SessionStream(config, seed=0)

    one_user_log(tmp_path / "a")
    config = make_config(tmp_path / "a", *MODES[0])
    for rank, world_size in ((0, 2), (1, 1), (-1, 1)):
        with pytest.raises(ValueError, match="0 <= rank < world_size <= 1"):
            SessionStream(config, seed=0, rank=rank, world_size=world_size)
    for position in (StreamPosition((2,), 7), StreamPosition((3,), 1), StreamPosition((1, 1), 1)):
        with pytest.raises(
            ValueError, match=r"position: (after step 1|expected a step from 0 to 6)"
        ):
            SessionStream(config, seed=0, position=position)

    part = tmp_path / "a" / "part-00000.parquet"
    damaged = bytearray(part.read_bytes())
    damaged[len(damaged) // 2 :] = b"\0" * (len(damaged) - len(damaged) // 2)
    part.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"part-00000.parquet is not a readable Parquet file"):
        SessionStream(config, seed=0)
    part.unlink()
    with pytest.raises(ValueError, match=r"part-00000.parquet is missing"):
        SessionStream(config, seed=0)


@pytest.mark.parametrize("name", ["events", "user_id"])
def test_a_file_of_another_kind_is_named(tmp_path, name):
    schema = SCHEMA.set(SCHEMA.get_field_index(name), pa.field(name, pa.string()))
    write_log(tmp_path, [[]], schema=schema)
    with pytest.raises(ValueError, match=f"part-00000.parquet: expected .* column '{name}'"):
        SessionStream(make_config(tmp_path, *MODES[0]), seed=0)
