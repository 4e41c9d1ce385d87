"""Predictions about new items and of new users, against loops over the events of the log."""

import json
from dataclasses import replace

import pytest

from gr.cohorts import Cohorts
from gr.config import EvalConfig
from gr.sequence import sequence_index
from gr.trainer import Trainer
from pipelines.batch import TokenKind
from pipelines.item_times import NEVER, kth_event_times
from tests.gr.batches import (
    NUM_ITEMS,
    batches,
    data_config,
    look_up,
    make_tables,
    random_log,
    random_sessions,
    train_config,
)
from tests.gr.test_trainer import WORLD
from tests.pipelines.logs import MODES, take_apart

K, USER_EVENTS = 3, 4


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return random_log(tmp_path_factory.mktemp("cohorts"))


@pytest.fixture(scope="module")
def item_times():
    """Return the sorted times of the events of each item."""
    times = [[] for _ in range(NUM_ITEMS)]
    for part in random_sessions(0):
        for row in part:
            for event in row["events"]:
                times[event["item_id"]].append(event["timestamp"])
    return [sorted(found) for found in times]


def with_cohorts(config, **changes):
    rules = {"new_item_events": K, "new_user_events": USER_EVENTS} | changes
    return replace(config, eval=replace(config.eval, **rules))


@pytest.mark.parametrize("k", [1, 3, 9])
def test_the_kth_event_is_that_of_the_sorted_events(log, item_times, k):
    found = kth_event_times(str(log), k=k, num_items=NUM_ITEMS).tolist()
    assert found == [times[k - 1] if len(times) >= k else NEVER for times in item_times]
    assert NEVER in found or k == 1


@pytest.mark.parametrize("mode", MODES, ids="-".join)
def test_members_are_those_with_few_events_before(log, item_times, mode):
    config = with_cohorts(train_config(data_config(log, mode)))
    cohorts, tables = Cohorts(config), make_tables(config)
    met = {name: set() for name in cohorts.names}
    for batch in batches(config.data):
        expected = {kind: {name: [] for name in cohorts.names} for kind in ("ranking", "retrieval")}
        for sequence in take_apart(batch, config.data):
            kinds = sequence["kind"]
            items = [t for t, kind in enumerate(kinds) if kind not in (0, TokenKind.ACTION)]
            known = [t for t in items if kinds[t] != TokenKind.CANDIDATE]

            def is_new(item, time):
                return sum(t < time for t in item_times[item]) < K

            for position, *_ in sequence["ranking"]:
                item = sequence["item_id"][items.index(position)]
                about = is_new(item, sequence["timestamp"][position])
                expected["ranking"]["new_items"].append(about)
                before = sum(t < position for t in known)
                expected["ranking"]["new_users"].append(before < USER_EVENTS)
            for position, target in sequence["retrieval"]:
                about = is_new(target, sequence["query_time"][position])
                expected["retrieval"]["new_items"].append(about)
                before = sum(t <= position for t in known)
                expected["retrieval"]["new_users"].append(before < USER_EVENTS)
        look_up(config, tables, batch)
        sequence_L = sequence_index(batch.offsets, batch.num_tokens)
        found = {
            "ranking": cohorts.of_ranking(batch, sequence_L),
            "retrieval": cohorts.of_retrieval(batch, sequence_L),
        }
        for kind, members in expected.items():
            assert {name: x.tolist() for name, x in found[kind].items()} == members
            for name, values in members.items():
                met[name] |= set(values)
    assert met == {name: {True, False} for name in cohorts.names}


def test_a_cohort_that_is_all_has_the_metrics_of_all(log):
    config = train_config(data_config(log, MODES[0]))
    everyone = with_cohorts(config, new_item_events=10**6, new_user_events=0)
    trainer = Trainer(everyone, WORLD, utc_offset=0, sequences_per_step=8)
    trainer.evaluation.roll(0)
    for batch in batches(config.data):
        trainer.score_step(batch)
    trainer.evaluation.finish()
    metrics = trainer.evaluation.lifetime()
    whole = {name: value for name, value in metrics.items() if not name.endswith("/new_items")}
    assert {f"{name}/new_items": value for name, value in whole.items()} == {
        name: value for name, value in metrics.items() if name.endswith("/new_items")
    }
    assert whole["num_examples-retrieval"] > 0
    json.dumps(metrics)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"new_item_events": -1}, "eval.new_item_events must be at least 0"),
        ({"new_user_events": -2}, "eval.new_user_events must be at least 0"),
    ],
)
def test_negative_limits_are_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        EvalConfig(**rules)


def test_new_items_need_rows_that_tell_their_item(log):
    config = train_config(data_config(log, MODES[0]))
    tables = dict(config.embeddings.tables)
    tables["item"] = replace(tables["item"], ids="hashed")
    hashed = replace(config, embeddings=replace(config.embeddings, tables=tables))
    with pytest.raises(ValueError, match=r"embeddings.tables.item.ids=\s*hashed"):
        with_cohorts(hashed)


def test_without_limits_no_log_is_read():
    cohorts = Cohorts(train_config(data_config("no-such-log", MODES[0])))
    assert cohorts.names == ()
