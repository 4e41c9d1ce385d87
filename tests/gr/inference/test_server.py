"""The server's answers over HTTP: what is right, what is refused and how, and what it counts."""

import json
import threading
import time

import numpy as np
import pytest

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient

from gr.inference.beam import SequenceQuestion, beam_search
from gr.inference.engine import before
from gr.inference.server import build_app
from gr.serve_config import ServeConfig
from tests.gr.inference.served import toy_recommender

# What the tests share takes long to make: one worker of pytest-xdist makes it.
pytestmark = pytest.mark.xdist_group("serve")
TIME = 1_700_600_000
BOUNDS = {"window_ms": 0.0, "max_candidates": 100, "max_history": 50, "max_body_mb": 0.02}


@pytest.fixture(scope="module")
def recommender(served):
    return served


@pytest.fixture
def fresh(served_run):
    """One that a test may change."""
    return toy_recommender(served_run)


@pytest.fixture(scope="module")
def client(recommender):
    app = build_app(recommender, ServeConfig(**BOUNDS))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def fresh_client(fresh):
    app = build_app(fresh, ServeConfig(**BOUNDS))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def recommend(client, **body):
    response = client.post("/recommend", json={"time": TIME} | body)
    assert response.status_code == 200, response.text
    return response.json()


def scores(found, name="click"):
    return {x["item_id"]: x["scores"][name] for x in found["items"]}


def event(item, timestamp, click, **more):
    watch = 9000 if click else 500
    event = {"item_id": item, "timestamp": timestamp, "click": click, "watch_ms": watch}
    return event | {"price": float(item % 3)} | more


def test_candidates_come_back_in_the_order_of_their_scores(client):
    found = recommend(client, user_id=3, candidates=[5, 9, 2, 17], top=3)
    assert found["user_id"] == 3
    assert found["history_events"] == 16
    assert found["checkpoint_step"] == 4
    order = [x["order"] for x in found["items"]]
    assert len(order) == 3
    assert order == sorted(order, reverse=True)
    assert order == [x["scores"]["click"] for x in found["items"]]
    by_watch = recommend(client, user_id=3, candidates=[5, 9, 2, 17], rank_by={"watch": 1.0})
    assert scores(by_watch).items() >= scores(found).items()


def test_a_history_in_the_request_is_a_stored_one(client, recommender):
    history = recommender.store.history(7)
    events = [
        event(int(item), int(t), bool(code == 2))
        for (item, t), code in zip(history.ints[:, :2], history.codes[:, 0], strict=True)
    ]
    stored = recommend(client, user_id=7, candidates=[1, 2, 3])
    given = recommend(client, history=events, candidates=[1, 2, 3])
    assert scores(stored) == pytest.approx(scores(given), abs=1e-6)
    assert given["user_id"] == -1
    mixed = [e | {"click": int(e["click"])} if n % 2 else e for n, e in enumerate(events)]
    assert scores(recommend(client, history=mixed, candidates=[1, 2, 3])) == scores(given)
    # Later events are not read.
    early = recommend(
        client, history=events[::-1], candidates=[1, 2, 3], time=events[3]["timestamp"]
    )
    assert early["history_events"] == 3


def test_features_of_a_candidate_may_be_given(client):
    known = recommend(client, user_id=3, candidates=[5, {"item_id": 4}])
    same = recommend(client, user_id=3, candidates=[{"item_id": 5, "price": 2.0}, 4])
    other = recommend(client, user_id=3, candidates=[{"item_id": 5, "price": 0.0}, 4])
    assert scores(known) == pytest.approx(scores(same), abs=1e-7)
    assert abs(scores(known)[5] - scores(other)[5]) > 1e-5
    assert scores(known)[4] == pytest.approx(scores(other)[4], abs=1e-7)
    unknown = recommend(client, user_id=3, candidates=[{"item_id": 5, "price": None}])
    assert abs(scores(known)[5] - scores(unknown)[5]) > 1e-5


def test_it_retrieves_and_ranks(client, recommender):
    found = recommend(client, user_id=3, retrieve=24, exclude_seen=True, exclude=[20])
    ids = {x["item_id"] for x in found["items"]}
    seen = set(recommender.store.history(3).ints[-16:, 0].tolist())
    assert ids == set(range(24)) - seen - {20}
    assert all(set(x["scores"]) == {"click", "watch", "retrieval"} for x in found["items"])
    found = recommend(client, user_id=3, retrieve=2, allow=[4, 9, 11], rank_by={"retrieval": 1.0})
    assert {x["item_id"] for x in found["items"]} < {4, 9, 11}


def test_added_events_count_from_the_next_request_on(fresh_client):
    client = fresh_client
    before = recommend(client, user_id=5, candidates=[1])
    new = [event(n, TIME - 100 + n, True) for n in range(6)]
    response = client.post("/events", json={"user_id": 5, "events": new})
    assert response.json()["user_id"] == 5
    after = recommend(client, user_id=5, candidates=[1])
    assert scores(after) != scores(before)
    earlier = recommend(client, user_id=5, candidates=[1], time=TIME - 100)
    assert earlier["history_events"] == 16
    assert client.get("/users/777").status_code == 404
    client.post("/events", json={"user_id": 777, "events": new})
    state = client.get("/users/777").json()
    assert state == {"user_id": 777, "history_events": 6, "newest_timestamp": TIME - 95}
    assert recommend(client, user_id=777, candidates=[1])["history_events"] == 6


def test_sequences_are_those_of_the_beam_search(client, recommender):
    body = {"user_id": 3, "time": TIME, "steps": 3, "width": 4, "results": 2, "exclude": [2]}
    response = client.post("/sequences", json=body)
    assert response.status_code == 200, response.text
    history = before(recommender.store.history(3), TIME, recommender.max_events)
    asked = SequenceQuestion(
        user_id=3, time=TIME, history=history, steps=3, width=4, results=2, exclude=np.array([2])
    )
    wanted = beam_search(recommender, asked)
    found = response.json()["sequences"]
    assert [tuple(x["item_ids"]) for x in found] == [x.item_ids for x in wanted]
    assert [x["score"] for x in found] == pytest.approx([x.score for x in wanted], abs=1e-5)
    for change, message in [
        ({"steps": 21}, "steps"),
        ({"min_steps": 4}, "min_steps must be within"),
        ({"actions": {"like": 1}}, "actions names"),
        ({"user_id": None, "history": []}, "the history is empty"),
    ]:
        response = client.post("/sequences", json=body | change)
        assert response.status_code == 422
        assert message in response.json()["error"]


WRONG = [
    ({"user_id": 99, "candidates": [1]}, 404, "nothing is known of user 99"),
    ({"user_id": 3, "candidates": [24]}, 422, "item 24 is not in the catalogue of 24 items"),
    ({"user_id": 3, "candidates": []}, 422, "candidates must not be empty"),
    ({"user_id": 3, "candidates": [4, 5, 4]}, 422, "must be distinct: item 4 stands 2 times"),
    ({"user_id": 3, "candidates": list(range(101))}, 422, "at most 100 candidates"),
    ({"user_id": 3, "retrieve": 101}, 422, "retrieve must be at most 100"),
    ({"user_id": 3}, 422, "expected candidates, or retrieve"),
    ({"candidates": [1]}, 422, "expected user_id"),
    ({"history": [], "retrieve": 3}, 422, "history is empty"),
    ({"user_id": 3, "candidates": ["5"]}, 422, "valid integer"),
    ({"user_id": "3", "candidates": [5]}, 422, "valid integer"),
    ({"user_id": 3.5, "candidates": [5]}, 422, "valid integer"),
    ({"user_id": 2**64, "candidates": [5]}, 422, "less than"),
    ({"user_id": 3, "candidates": [1], "mistake": 1}, 422, "mistake: Extra inputs"),
    ({"user_id": 3, "candidates": [1], "rank_by": {"like": 1}}, 422, "rank_by names"),
    ({"user_id": 3, "candidates": [1], "exclude": [2]}, 422, "what may be retrieved"),
    ({"user_id": 3, "retrieve": 1, "allow": [77]}, 422, "item 77 is not in the catalogue"),
    ({"history": [event(99, 5, True)], "candidates": [1]}, 422, "item 99 is not in"),
    ({"history": [event(1, -5, True)], "candidates": [1]}, 422, "greater than or equal to 0"),
    ({"history": [event(1, 5, "yes")], "candidates": [1]}, 422, "click"),
    (
        {"history": [event(1, 5, True) | {"watch_ms": -5000}], "candidates": [1]},
        422,
        "watch_ms must be null or finite above -1000, as data.tasks.watch reads it",
    ),
    ({"history": [event(1, 5, True)] * 51, "candidates": [1]}, 422, "at most 50 items"),
    ({"user_id": 3, "candidates": [{"item_id": 1, "price": [2]}]}, 422, "price"),
]


@pytest.mark.parametrize(("body", "status", "message"), WRONG, ids=[x[2] for x in WRONG])
def test_what_cannot_be_answered_says_why(client, body, status, message):
    response = client.post("/recommend", json={"time": TIME} | body)
    assert response.status_code == status
    assert list(response.json()) == ["error"]
    assert message in response.json()["error"]


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"{", 400, "the body is no JSON"),
        (b"\xff\xfe", 400, ""),
        (b"", 422, "body: Field required"),
        (b"[1]", 422, "body"),
        (b'{"user_id": 3, "candidates": [{"item_id": 1, "price": NaN}]}', 422, "finite"),
        (b'{"user_id": NaN, "candidates": [1]}', 422, "integer"),
        (b'{"user_id": 3, "candidates": [1], "rank_by": {"click": Infinity}}', 422, "finite"),
        (b" " * 30_000, 413, "a body may have 20,000 bytes"),
    ],
)
def test_bodies_that_are_no_request(client, content, status, message):
    response = client.post(
        "/recommend", content=content, headers={"content-type": "application/json"}
    )
    assert response.status_code == status, response.text
    assert message in response.json()["error"]


def test_a_hundred_thousand_candidates_are_several_requests(recommender):
    app = build_app(recommender, ServeConfig())
    with TestClient(app, raise_server_exceptions=False) as client:
        body = {"user_id": 3, "time": TIME, "candidates": list(range(100_000))}
        response = client.post("/recommend", json=body)
        assert response.status_code == 422
        assert "at most 20000 candidates a request, got 100000" in response.json()["error"]
        assert client.get("/health").status_code == 200


def test_a_body_of_unknown_length_is_cut_off(client):
    response = client.post("/recommend", content=(b" " * 9000 for _ in range(5)))
    assert response.status_code == 413


def test_too_many_are_refused_and_late_ones_told(fresh):
    gate, begun = threading.Event(), threading.Event()
    real = fresh.answer

    def slow(questions):
        begun.set()
        assert gate.wait(10)
        return real(questions)

    fresh.answer = slow
    config = ServeConfig(window_ms=0.0, max_queue=1, max_batch=1, timeout_s=1.0)
    body = {"user_id": 3, "candidates": [1]}
    with TestClient(build_app(fresh, config)) as client:
        statuses = []
        threads = [
            threading.Thread(
                target=lambda: statuses.append(client.post("/recommend", json=body).status_code)
            )
            for _ in range(2)
        ]
        threads[0].start()
        assert begun.wait(10)
        threads[1].start()
        while client.get("/health").json()["waiting"] != 1:
            time.sleep(0.001)
        refused = client.post("/recommend", content=b"not even read")
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert client.post("/events", json={}).status_code == 422  # has no queue
        metrics = client.get("/metrics").text
        assert 'gr_requests_total{path="/recommend",status="429"} 1.0' in metrics
        for thread in threads:
            thread.join()
        assert statuses == [504, 504]
        gate.set()
        assert client.post("/recommend", json=body).status_code == 200


def test_health_metrics_and_description(fresh_client):
    client = fresh_client
    health = client.get("/health").json()
    assert health == {
        **{"status": "ok", "checkpoint_step": 4, "users": 24, "items": 24},
        **{"tasks": ["click", "watch"], "waiting": 0},
    }
    recommend(client, user_id=3, candidates=[1, 2])
    client.post("/recommend", json={})
    client.get("/nothing/at/all")
    text = client.get("/metrics").text
    assert 'gr_requests_total{path="/recommend",status="200"} 1.0' in text
    assert 'gr_requests_total{path="/recommend",status="422"} 1.0' in text
    assert 'gr_requests_total{path="other",status="404"} 1.0' in text
    assert "gr_items_total 2.0" in text
    assert "gr_users 24.0" in text
    description = client.get("/openapi.json").json()
    fields = description["components"]["schemas"]["Event"]["properties"]
    assert set(fields) == {"item_id", "timestamp", "click", "watch_ms", "price"}
    assert set(description["paths"]) == {
        "/sequences",
        "/recommend",
        "/events",
        "/users/{user_id}",
        "/health",
        "/metrics",
    }


def test_a_defect_is_500_and_the_server_lives(recommender):
    def broken(questions):
        raise KeyError("secret")

    app = build_app(recommender, ServeConfig(**BOUNDS))
    app.state.batcher._answer = broken
    with TestClient(app, raise_server_exceptions=False) as client:
        response = client.post("/recommend", json={"user_id": 3, "candidates": [1]})
        assert response.status_code == 500
        assert "secret" not in response.text
        assert client.get("/health").status_code == 200


def test_answers_are_those_of_the_engine(client, recommender):
    found = recommend(client, user_id=11, candidates=list(range(24)))
    stored = recommender.store.history(11)
    assert json.dumps(found)  # no NaN
    assert len(stored.ints) > 0
    values = np.array([x["scores"]["watch"] for x in found["items"]])
    assert np.isfinite(values).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"port": -1}, "--port must be at least 0"),
        ({"port": 65_536}, "--port must be at most 65535"),
        ({"max_queue": 0}, "--max-queue must be at least 1"),
        ({"timeout_s": 0.0}, "--timeout-s must be positive"),
        ({"max_body_mb": float("inf")}, "--max-body-mb must be positive"),
    ],
)
def test_wrong_settings(change, message):
    with pytest.raises(ValueError, match=message):
        ServeConfig(**change)
