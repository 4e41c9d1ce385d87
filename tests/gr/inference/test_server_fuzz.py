"""Requests by the hundred: what is nearly right, and what schemathesis makes of the description.

The latter with `pytest -m slow`: importing schemathesis takes longer than the rest.
"""

import pytest

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from gr.inference.server import build_app
from gr.serve_config import ServeConfig
from tests.gr.inference.served import toy_recommender

# What the tests share takes long to make: one worker of pytest-xdist makes it.
pytestmark = pytest.mark.xdist_group("serve")


@pytest.fixture(scope="module")
def recommender(served_run):
    return toy_recommender(served_run)  # its own, because events are added


def app_of(recommender):
    return build_app(recommender, ServeConfig(window_ms=0.0, max_candidates=100))


@pytest.fixture(scope="module")
def client(recommender):
    with TestClient(app_of(recommender), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def schema(recommender):
    schemathesis = pytest.importorskip("schemathesis")
    return schemathesis.openapi.from_asgi("/openapi.json", app_of(recommender))


@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.slow
@pytest.mark.parametrize("path", ["/recommend", "/sequences", "/events", "/users/{user_id}"])
def test_every_answer_is_as_described(schema, path, mode):
    from schemathesis import GenerationMode
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    wanted = [
        not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
    ]
    method = "GET" if "{" in path else "POST"
    cases = schema[path][method].as_strategy(generation_mode=GenerationMode(mode))

    @settings(
        max_examples=400,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    @given(case=cases)
    def answers(case):
        response = case.call_and_validate(checks=wanted)
        assert response.status_code != 503  # it does run

    answers()


ITEMS = st.integers(-2, 25)
TIMES = st.integers(1_700_000_000, 1_700_700_000)
NOT = st.sampled_from([None, True, "1", 1.5, -1, 2**63, [], {}])
CLICKS = st.one_of(st.booleans(), st.none(), st.integers(0, 1))
EVENTS = st.fixed_dictionaries(
    {"item_id": ITEMS, "timestamp": TIMES},
    optional={
        "click": CLICKS,
        "watch_ms": st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False)),
        "price": st.one_of(st.none(), st.floats(0, 3)),
    },
)
KNOWN = st.integers(0, 23)
TASKS = st.sampled_from(["click", "watch"])
CANDIDATES = st.one_of(KNOWN, st.fixed_dictionaries({"item_id": KNOWN}))
FILTERS = {
    "exclude": st.lists(ITEMS, max_size=5),
    "exclude_seen": st.booleans(),
    "allow": st.lists(KNOWN, max_size=9),
}
WHO = st.one_of(
    st.fixed_dictionaries({"user_id": KNOWN, "time": TIMES}),
    st.fixed_dictionaries({"history": st.lists(EVENTS, max_size=20), "time": TIMES}),
)
WHAT = st.one_of(
    st.fixed_dictionaries(
        {"candidates": st.lists(CANDIDATES, min_size=1, max_size=8, unique_by=str)},
        optional={
            "rank_by": st.dictionaries(st.sampled_from(["click", "watch"]), st.floats(-5, 5))
        },
    ),
    st.fixed_dictionaries({"retrieve": st.integers(1, 100)}, optional=FILTERS),
)
NAMES = ["user_id", "time", "history", "candidates", "retrieve", "allow", "rank_by", "top"]
CHANGES = st.dictionaries(st.sampled_from(NAMES), NOT, max_size=1)
QUESTIONS = st.builds(lambda who, what, change: who | what | change, WHO, WHAT, CHANGES)


@pytest.mark.parametrize("num_requests", [40, pytest.param(2000, marks=pytest.mark.slow)])
def test_requests_that_are_nearly_right_get_an_answer(client, num_requests):
    statuses = []

    @settings(max_examples=num_requests, deadline=None, derandomize=True)
    @given(body=QUESTIONS)
    def answers(body):
        response = client.post("/recommend", json=body)
        statuses.append(response.status_code)
        assert response.status_code in (200, 404, 422), response.text
        if response.status_code != 200:
            assert len(response.json()["error"]) > 10
            return
        items = response.json()["items"]
        wanted = body.get("candidates")
        if wanted:
            ids = [x if isinstance(x, int) else x["item_id"] for x in wanted]
            assert {x["item_id"] for x in items} <= set(ids)
            assert len(items) == min(len(ids), body.get("top") or len(ids))
        else:
            allow = body.get("allow")
            assert len(items) <= body["retrieve"]
            found = {x["item_id"] for x in items}
            assert not found & set(body.get("exclude", []))
            assert allow is None or found <= set(allow)
        assert [x["order"] for x in items] == sorted((x["order"] for x in items), reverse=True)

    answers()
    assert num_requests // 10 <= statuses.count(200) < num_requests


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=st.binary(max_size=200))
def test_any_bytes_get_an_answer(client, body):
    headers = {"content-type": "application/json"}
    response = client.post("/recommend", content=body, headers=headers)
    assert response.status_code in (400, 422)
