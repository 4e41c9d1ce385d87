"""Questions answered together and alone, against the trainer's own passes over the log."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from gr.evaluate import run_config
from gr.inference.engine import Question, before
from gr.inference.recommend import recommend
from gr.inference.user_store import UserHistory
from tests.e2e.toy import events
from tests.gr.inference.served import toy_recommender, toy_run

# What the tests share takes long to make: one worker of pytest-xdist makes it.
pytestmark = pytest.mark.xdist_group("serve")


@pytest.fixture(scope="module")
def run_dir(served_run):
    return served_run


@pytest.fixture(scope="module")
def recommender(served):
    return served


@pytest.fixture(scope="module")
def log_scores(run_dir, tmp_path_factory):
    """What `gr recommend` says of the log's events."""
    output = tmp_path_factory.mktemp("scores") / "out"
    recommend(run_config(run_dir), run_dir, output)
    return {
        name: pq.read_table(output / name).to_pandas().sort_values(["user_id", "timestamp"])
        for name in ("ranking", "retrieval")
    }


def asked(recommender, user, time, items=None, **options):
    history = before(recommender.store.history(user), time, recommender.max_events)
    rows = None
    if items is not None:
        rows = recommender.item_rows(np.array(items), time=time, context=history.context)
    return Question(user_id=user, time=time, history=history, candidates=rows, **options)


def first_of_last_session(rows):
    """Later events of a session read its earlier ones as parts of it, which no request has."""
    last = rows[rows["session_id"] == 5]
    begin = {}
    for event in events(users=24):
        if event["session_id"] == 5:
            begin.setdefault(event["user_id"], event["timestamp"])
    return last[last["timestamp"] == last["user_id"].map(begin)]


def test_candidates_have_the_scores_of_the_log(recommender, log_scores):
    last = first_of_last_session(log_scores["ranking"])
    assert len(last) == 24
    questions = [asked(recommender, r.user_id, r.timestamp, [r.item_id]) for r in last.itertuples()]
    for row, found in zip(last.itertuples(), recommender.answer(questions), strict=True):
        assert found.item_ids.tolist() == [row.item_id]
        assert found.scores["click"][0] == pytest.approx(row.click, abs=1e-5)
        assert found.scores["watch"][0] == pytest.approx(row.watch, rel=1e-4)
        assert found.num_history == 16


def test_what_is_retrieved_stands_where_evaluation_ranks_it(recommender, log_scores):
    last = first_of_last_session(log_scores["retrieval"])
    assert len(last) > 6
    questions = [
        asked(recommender, r.user_id, r.timestamp, retrieve=24, rank_by={"retrieval": 1.0})
        for r in last.itertuples()
    ]
    for row, found in zip(last.itertuples(), recommender.answer(questions), strict=True):
        assert len(found.item_ids) == 24
        assert found.item_ids.tolist().index(row.item_id) + 1 == row.rank
        assert (np.diff(found.scores["retrieval"]) <= 0).all()


def test_retrieved_items_are_ranked_by_the_same_checkpoint(recommender):
    time = 1_700_600_000
    (found,) = recommender.answer([asked(recommender, 3, time, retrieve=7)])
    assert (np.diff(found.scores["click"]) <= 0).all()
    (again,) = recommender.answer([asked(recommender, 3, time, found.item_ids[::-1].tolist())])
    assert again.item_ids.tolist() == found.item_ids.tolist()
    np.testing.assert_allclose(again.scores["click"], found.scores["click"], atol=1e-6)
    assert "retrieval" not in again.scores


def test_answers_do_not_depend_on_who_else_asks(recommender):
    time = 1_700_600_000
    questions = [
        asked(recommender, 1, time, [5, 6, 7], top=2),
        asked(recommender, 2, time, retrieve=9, exclude=np.array([1, 2, 3])),
        asked(recommender, 9, time, [23], rank_by={"watch": 0.001, "click": 2.0}),
        asked(recommender, 9, 0, [4, 3]),  # nothing before
        asked(recommender, 2, time, retrieve=30, allow=np.array([3, 8, 20])),
    ]
    together = recommender.answer(questions)
    for question, found in zip(questions, together, strict=True):
        (alone,) = recommender.answer([question])
        assert alone.item_ids.tolist() == found.item_ids.tolist()
        for name, values in alone.scores.items():
            np.testing.assert_allclose(found.scores[name], values, rtol=1e-5, atol=1e-6)
    assert [len(x.item_ids) for x in together] == [2, 9, 1, 2, 3]
    assert not {1, 2, 3} & set(together[1].item_ids.tolist())
    mixed = together[2].scores["watch"] * np.float64(0.001) + 2 * together[2].scores["click"]
    assert together[2].order == pytest.approx(mixed, rel=1e-6)
    assert together[3].num_history == 0


def test_items_without_known_features_are_scored_as_unknown(recommender):
    context = recommender.store.history(1).context
    rows = recommender.item_rows(np.array([2, 24]), time=5, context=context)
    assert rows[0].tolist() == [2, 5, 2]
    assert rows[1].tolist() == [24, 5, -1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected candidates, or retrieve.* got neither"),
        ({"items": [1], "retrieve": 2}, "got both"),
        ({"retrieve": 2, "time": 0}, "the history is empty before the time"),
        ({"items": [1], "rank_by": {"like": 1.0}}, "rank_by names ..like..: expected some of"),
        ({"items": [1], "rank_by": {"retrieval": 1.0}}, "rank_by names"),
    ],
)
def test_questions_without_an_answer(recommender, options, message):
    question = asked(recommender, 1, **({"time": 1_700_600_000} | options))
    with pytest.raises(ValueError, match=message):
        recommender.answer([question])


def test_scores_that_are_not_finite_are_told(recommender):
    question = asked(recommender, 1, 1_700_600_000, [1, 2], rank_by={"watch": 1e308})
    with pytest.raises(ValueError, match="rank_by has weights that are too large"):
        recommender.answer([question])


def test_what_cannot_be_served(run_dir, tmp_path):
    with pytest.raises(ValueError, match="no complete checkpoint of step 3"):
        toy_recommender(run_dir, step=3)
    with pytest.raises(ValueError, match="checkpoint of another model"):
        toy_recommender(run_dir, "model.num_layers=3")
    pytest.importorskip("faiss")
    with pytest.raises(ValueError, match="FAISS does not know"):
        toy_recommender(run_dir, faiss="Flut")


def test_a_model_without_ranking_retrieves_and_compares(tmp_path):
    recommender = toy_recommender(toy_run(tmp_path, without=("tasks:", "click:", "watch:")))
    time = 1_700_600_000
    (found,) = recommender.answer([asked(recommender, 3, time, retrieve=5)])
    (again,) = recommender.answer([asked(recommender, 3, time, found.item_ids[::-1].tolist())])
    assert again.item_ids.tolist() == found.item_ids.tolist()
    assert list(again.scores) == ["retrieval"]
    np.testing.assert_allclose(again.scores["retrieval"], found.scores["retrieval"], atol=1e-6)


def test_before_takes_the_newest_events_before_a_time():
    ints = np.stack([np.arange(6), np.array([1, 3, 3, 5, 7, 9])], 1)
    history = UserHistory(ints, np.zeros((6, 1), np.uint8), np.empty(0, np.int64))
    assert before(history, 3, 9).ints[:, 0].tolist() == [0]
    assert before(history, 8, 2).ints[:, 0].tolist() == [3, 4]
    assert before(history, 0, 2).ints.shape == (0, 2)
    assert torch.from_numpy(before(history, 99, 9).ints).shape == (6, 2)


def test_keys_and_values_are_kept_where_the_model_allows_it(tmp_path):
    run_dir = toy_run(tmp_path, "model.encoding.position=from_start")
    kept = toy_recommender(run_dir, cache_bytes=1_000_000)
    anew = toy_recommender(run_dir)
    whole = kept.store.history(5)
    reused = []
    for number in (5, 6, 11):
        history = UserHistory(whole.ints[:number], whole.codes[:number], whole.context)
        time = int(history.ints[-1, 1]) + 1
        rows = kept.item_rows(np.array([3, 7, 11]), time=time, context=whole.context)
        question = Question(user_id=5, time=time, history=history, candidates=rows)
        (found,), (wanted,) = kept.answer([question]), anew.answer([question])
        assert found.item_ids.tolist() == wanted.item_ids.tolist()
        np.testing.assert_allclose(found.scores["click"], wanted.scores["click"], atol=1e-5)
        assert bool(found.encoded_anew) == (found.reused_tokens == 0)
        assert wanted.encoded_anew == "there is no cache (cache_bytes=0)"
        reused.append(found.reused_tokens)
    assert reused[0] == 0
    assert 0 < reused[1] < reused[2]


def test_where_it_does_not_the_answer_says_why(recommender, run_dir):
    kept = toy_recommender(run_dir, cache_bytes=1_000_000)
    for each in (kept, recommender):
        (found,) = each.answer([asked(each, 5, 1_700_600_000, [1])])
        assert found.encoded_anew == "model.encoding.position=from_session"
