"""Requests in columns: the same rows as the stream makes of a log, and what is refused."""

import numpy as np
import pytest
import torch

from gr.config import EncodingConfig, HSTUConfig
from gr.hstu import kept_history
from gr.inference import RequestEncoder
from gr.sequence import sequence_info
from tests.gr.batches import batches, data_config, random_sessions, train_config
from tests.gr.inference.drawn import joined, make_lookup, make_model, make_scorer
from tests.pipelines.logs import RICH
from tests.pipelines.session_log import write_log

NAMES = ("item_id", "timestamp", "click", "watch", "tab", "price", "seen", "genres")
CONTEXT = ("country", "age", "creators")


def columns(events, names=NAMES):
    return {name: [event.get(name) for event in events] for name in names}


@pytest.mark.parametrize(("anchor", "context"), [("event", "merged"), ("session", "prefix")])
def test_scores_are_those_of_the_stream(tmp_path, anchor, context):
    """Every session of a log, overlaps and unknown values included."""
    partitions = random_sessions(3)
    write_log(tmp_path / "log", partitions)
    data = data_config(
        tmp_path / "log",
        ("interleaved", anchor, "session", context),
        sessions_per_partition=1,
        max_history_tokens=12,
        max_session_events=9,
        overlap_slack=60,
        **RICH,
    )
    config = train_config(
        data,
        hstu=HSTUConfig(num_heads=2, qk_dim=4, v_dim=4, scaling_length=8, bias="position_time"),
        encoding=EncodingConfig(position="from_session", position_buckets=40, time="log"),
    )
    model, lookup, scorer = make_model(config), make_lookup(config), make_scorer(config)
    past = {}  # by user, in the order of arrival, with the context of their sessions
    rows = {(row["user_id"], row["session_id"]): row for part in partitions for row in part}
    for batch in batches(data):
        wanted = []
        for user, session in zip(batch.user_id.tolist(), batch.session_id.tolist(), strict=True):
            row = rows[user, session]
            history = past.setdefault(user, [])
            wanted.append((row, list(history)))
            history += [{**event, **row["context"]} for event in row["events"]]
        batch, found_rows = lookup(batch)
        info = sequence_info(batch, keep_history=kept_history(config.model))
        with torch.no_grad():
            expected = model(batch, info, found_rows).ranking["click"]
        requests = scorer.encoder.requests(
            [row["user_id"] for row, _ in wanted],
            [row["start_ts"] for row, _ in wanted],
            joined([columns(history, NAMES + CONTEXT) for _, history in wanted]),
            [len(history) for _, history in wanted],
            joined([columns([row["context"]], CONTEXT) for row, _ in wanted]),
        )
        counts = [len(row["events"]) for row, _ in wanted]
        items = joined([columns(row["events"]) for row, _ in wanted])
        del items["timestamp"], items["click"], items["watch"]
        candidates = scorer.encoder.candidates(requests, items, counts)
        got = scorer.score(scorer.encode_history(requests), candidates).ranking["click"]
        ends = np.cumsum(counts)
        compared = range(len(got)) if anchor == "session" else ends - counts
        for i in compared:  # anchor=event: the first event alone sees what a candidate sees
            torch.testing.assert_close(got[i], expected[i], rtol=1e-9, atol=1e-9)


HISTORY = columns(
    [{"item_id": 3, "timestamp": 10, "click": True, "watch": 1.0, "tab": 0, "price": 1.0}] * 2
)


def encoder():
    return RequestEncoder(data_config("none", ("interleaved", "event", "session", "none")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"history": {k: v for k, v in HISTORY.items() if k != "click"}},
            "lacks the column 'click'",
        ),
        ({"history": HISTORY | {"item_id": [3, None]}}, "item_id must not be null"),
        ({"history": HISTORY | {"item_id": [3, -4]}}, "at least 0, got -4"),
        ({"history": HISTORY | {"item_id": [3, 1.5]}}, "history.item_id must hold integer"),
        ({"history": HISTORY | {"item_id": ["a", "b"]}}, "history.item_id must hold integer"),
        ({"history": HISTORY | {"tab": [0]}}, "must hold 2 values, got 1"),
        ({"counts": [1]}, "must hold 1 values, got 2"),
        ({"counts": [3, -1]}, "one value a request, 1, got 2"),
        ({"counts": [-1]}, "at least 0"),
        ({"time": [1, 2]}, "time must have one value a request"),
        ({"user_id": ["x"]}, "user_id must be a list of integers"),
    ],
)
def test_wrong_requests_say_what_is_wrong(changes, message):
    given = {"user_id": [1], "time": [50], "history": HISTORY, "counts": [2]}
    context = {"country": [4], "age": [30.0]}
    with pytest.raises(ValueError, match=message):
        encoder().requests(**(given | changes), context=context)


def test_events_at_or_after_the_request_are_left_out_and_counted():
    history = HISTORY | {"timestamp": [60, 10]}
    found = encoder().requests([1], [50], history, [2], {"country": [4], "age": [30.0]})
    assert found.counts.tolist() == [1]
    assert found.ints[:, 1].tolist() == [10]
    assert found.num_left_out == 1


def test_wrong_candidates_say_what_is_wrong():
    made = encoder()
    requests = made.requests([1], [50], HISTORY, [2], {"country": [4], "age": [30.0]})
    items = {"item_id": [1, 2], "tab": [0, 1], "price": [None, 2.0]}
    for changes, counts, message in (
        ({"price": [1.0, float("inf")]}, [2], "must be finite"),
        ({"item_id": [1, 2, 3]}, [2], "must hold 2 values"),
        ({}, [1, 1], "one value a request, 1"),
        ({}, [-2], "each at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            made.candidates(requests, items | changes, counts)
    with pytest.raises(ValueError, match="lacks the column 'tab'"):
        made.candidates(requests, {"item_id": [1], "price": [1.0]}, [1])
