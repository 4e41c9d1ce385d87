"""Scores with a cached history, against one pass of the training code for each candidate."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gr.inference import Scorer, tails
from tests.gr.inference.drawn import (
    World,
    alone,
    make_lookup,
    make_model,
    make_scorer,
    page_of,
    pages_in_use,
    runs,
)

COUNTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), min_size=1, max_size=3)


def assert_same(got, expected, tolerance=1e-10):
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)


@settings(deadline=None, max_examples=10)
@given(runs(), COUNTS, st.integers(1, 5), st.integers(0, 99))
def test_microbatches_equal_a_pass_of_each_candidate(config, counts, microbatch, seed):
    check_microbatches(config, counts, microbatch, seed)


@pytest.mark.slow
@settings(deadline=None, max_examples=500)
@given(runs(), COUNTS, st.integers(1, 5), st.integers(0, 99))
def test_microbatches_of_many_runs(config, counts, microbatch, seed):
    check_microbatches(config, counts, microbatch, seed)


@settings(deadline=None, max_examples=4)
@given(runs(), COUNTS, st.integers(1, 5), st.integers(0, 99))
def test_in_float32_they_are_within_a_hundred_thousandth(config, counts, microbatch, seed):
    """Of the largest score, against passes of the training code in float32 too."""
    history, items = zip(*counts, strict=True)
    world = World(config, seed, history)
    requests = world.requests()
    candidates = world.candidates(requests, items)
    model, lookup = make_model(config).float(), make_lookup(config, torch.float32)
    scorer = Scorer(config, model, lookup, torch.device("cpu"))
    encoded = scorer.encode_history(requests)
    if not sum(items) or not config.data.tasks:
        return
    ranking, _ = alone(config, model, lookup, requests, candidates)
    found = scorer.score(encoded, candidates, microbatch=microbatch)
    for name, x in found.ranking.items():
        assert (x - ranking[name]).abs().max() <= 1e-5 * ranking[name].abs().max().clamp(min=1)


@settings(deadline=None, max_examples=4)
@given(runs(), st.integers(1, 9), st.integers(1, 4), st.integers(2, 5), st.integers(0, 99))
def test_as_the_tail_of_a_sequence_laid_out_whole_they_are_the_same(
    config, history, items, microbatch, seed
):
    """As a GPU computes many candidates (gr/inference/tails.py)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tails, "is_faster", lambda *_, **__: True)
        check_microbatches(config, [(history, items)], microbatch, seed)


def check_microbatches(config, counts, microbatch, seed):
    history, items = zip(*counts, strict=True)
    world = World(config, seed, history)
    requests = world.requests()
    candidates = world.candidates(requests, items)
    scorer = make_scorer(config)
    encoded = scorer.encode_history(requests)
    ranking, vectors = (
        alone(config, make_model(config), make_lookup(config), requests, candidates)
        if sum(items)
        else ({}, None)
    )
    if vectors is not None:
        owner = torch.repeat_interleave(torch.tensor(items))
        assert_same(encoded.user_vectors[owner], vectors)
    assert encoded.has_history.tolist() == [n > 0 for n in requests.counts]
    if not config.data.tasks:
        with pytest.raises(ValueError, match="no ranking head"):
            scorer.score(encoded, candidates)
        return
    found = scorer.score(encoded, candidates, microbatch=microbatch)
    for name, x in found.ranking.items():
        assert x.shape == (sum(items),)
        if len(x):
            assert_same(x, ranking[name])


GOING_ON = {
    "config": runs(stable=True),
    "lengths": st.lists(st.integers(0, 4), min_size=2, max_size=3),
    "growth": st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=4),
    "pages": st.sampled_from([5, 30]),
    "seed": st.integers(0, 99),
}


@settings(deadline=None, max_examples=8)
@given(**GOING_ON)
def test_requests_of_users_who_go_on_equal_those_without_a_cache(**drawn):
    check_going_on(**drawn)


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(**GOING_ON)
def test_many_users_who_go_on(**drawn):
    check_going_on(**drawn)


def check_going_on(config, lengths, growth, pages, seed):
    world = World(config, seed, lengths)
    scorer = make_scorer(config, cache_bytes=pages * page_of(config))
    model, lookup = make_model(config), make_lookup(config)
    for counts in growth:
        requests = world.requests()
        candidates = world.candidates(requests, [2] * len(lengths))
        ranking, vectors = alone(config, model, lookup, requests, candidates)
        if not config.data.tasks:
            encoded = scorer.encode_history(requests)
        elif seed % 2:
            encoded = scorer.encode_history(requests)
            found = scorer.score(encoded, candidates, microbatch=1)
        else:
            encoded, found = scorer.answer(requests, candidates, microbatch=2)
            again = scorer.score(encoded, candidates, microbatch=1)
            for name, x in again.ranking.items():
                assert_same(x, found.ranking[name])
        assert_same(encoded.user_vectors, vectors[::2])
        for name in config.data.tasks:
            assert_same(found.ranking[name], ranking[name])
        for reused, reason in zip(encoded.reused, encoded.reasons, strict=True):
            assert (reused > 0) == (reason == "")
        del encoded
        assert pages_in_use(scorer) == 0
        world.grow(counts[: len(lengths)])
