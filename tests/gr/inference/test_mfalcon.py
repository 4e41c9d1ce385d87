"""Scores with a cached history, against one pass of the training code for each candidate."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.gr.inference.drawn import World, alone, make_lookup, make_model, make_scorer, runs

COUNTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), min_size=1, max_size=3)


def assert_same(got, expected, tolerance=1e-10):
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)


@settings(deadline=None, max_examples=25)
@given(runs(), COUNTS, st.integers(1, 5), st.integers(0, 99))
def test_microbatches_equal_a_pass_of_each_candidate(config, counts, microbatch, seed):
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
