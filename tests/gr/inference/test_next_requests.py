"""Next requests as their graphs compute them, run without a graph: what a pass of each gives."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from embeddings.vocabulary import Vocabulary
from gr.bench_encoders import Shape
from gr.config import EncodingConfig, HSTUConfig, RotaryConfig
from gr.inference.lookup import LocalRows, TableLookup
from gr.inference.mfalcon import Scorer
from gr.inference.next_requests import NextRequests, local_rows
from gr.inference.prefix import prefix_stable
from tests.gr.batches import NUM_ITEMS, data_config, make_tables, train_config
from tests.gr.inference.drawn import (
    World,
    alone,
    make_lookup,
    make_model,
    page_of,
    pages_in_use,
    runs,
)

MODE = ("interleaved", "event", "session", "none")
HSTU = HSTUConfig(
    num_heads=2, qk_dim=4, v_dim=4, scaling_length=8, bias="position_time",
    rotary=RotaryConfig(angles="sum"), final_norm=True,
)  # fmt: skip
STILL = EncodingConfig(position="from_start", position_buckets=60, gap="log")


class Computed(NextRequests):
    """Computes on a CPU what a graph would, and counts."""

    count = 0

    def takes(self, users, requests, items):
        super().takes(users, requests, items)
        return super().takes(users, requests, items)  # as if such ones had been seen

    def _found(self, size, numbers):
        self.count += 1
        with self.evaluating():
            return self._compute(size, numbers)


def rows_for(config, model, scorer):
    """Return the rows of the run's tables, if its next requests can be graphs."""
    lookup = TableLookup(model, None, None)
    lookup.local = lambda features: LocalRows(
        Vocabulary(config.embeddings),
        {
            feature: (name, tables.local_weight(name))
            for name, table in config.embeddings.tables.items()
            for feature in {*table.features} & {*features}
        },
        torch.float64,
    )
    tables = make_tables(config)
    return local_rows(config, model, scorer.encoder, lookup, scorer.stacks)


def make_scorer(config, pages):
    """Return a scorer that computes next requests as graphs do; None if they cannot be graphs."""
    model = make_model(config)
    scorer = Scorer(
        config, model, make_lookup(config), torch.device("cpu"), cache_bytes=pages * page_of(config)
    )
    rows = rows_for(config, model, scorer)
    if rows is None:
        return None
    scorer.next = Computed(
        model, scorer.encoder, scorer.stacks[0], scorer.users.stores[0], rows,
        windowed=scorer.windowed_candidates, evaluating=scorer.passes.evaluating,
    )  # fmt: skip
    return scorer


def check(config, lengths, growth, pages, seed):
    """Return how many requests went that way; None if none of this run can."""
    scorer = make_scorer(config, pages)
    if scorer is None:
        return None
    world = World(config, seed, lengths)
    model, lookup = make_model(config), make_lookup(config)
    for counts in growth:
        requests = world.requests()
        candidates = world.candidates(requests, [2] * len(lengths))
        ranking, vectors = alone(config, model, lookup, requests, candidates)
        found = None
        if not config.data.tasks or seed % 2:
            encoded = scorer.encode_history(requests)
            if config.data.tasks:
                found = scorer.score(encoded, candidates, microbatch=1)
        else:
            encoded, found = scorer.answer(requests, candidates, microbatch=2)
            again = scorer.score(encoded, candidates, microbatch=1)
            for name, x in again.ranking.items():
                same(x, found.ranking[name])
        same(encoded.user_vectors, vectors[::2])
        for name in config.data.tasks:
            same(found.ranking[name], ranking[name])
        del encoded
        assert pages_in_use(scorer) == 0
        world.grow(counts[: len(lengths)])
    return scorer.next.count


def same(got, expected):
    torch.testing.assert_close(got.double(), expected.double(), rtol=1e-10, atol=1e-10)


GOING_ON = {
    "config": runs(stable=True).filter(prefix_stable),
    "lengths": st.lists(st.integers(0, 4), min_size=2, max_size=3),
    "growth": st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=2, max_size=4),
    "pages": st.sampled_from([5, 30]),
    "seed": st.integers(0, 99),
}


@settings(deadline=None, max_examples=3)
@given(**GOING_ON)
def test_users_who_go_on(**drawn):
    assume(check(**drawn) is not None)


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(**GOING_ON)
def test_many_users_who_go_on(**drawn):
    assume(check(**drawn) is not None)


@pytest.mark.parametrize("context", ["none", "prefix"])
@pytest.mark.parametrize("mode", ["interleaved", "merged"])
def test_every_next_request_is_one_graph(mode, context):
    mode = (mode, "session" if mode == "merged" else "event", "session", context)
    data = data_config("none", mode, positive=(), max_history_tokens=60)
    plain = HSTUConfig(num_heads=2, qk_dim=4, v_dim=4, scaling_length=8)
    config = train_config(
        data, num_layers=2, hstu=HSTU if context == "none" else plain, encoding=STILL
    )
    count = check(config, [4, 7], [[3, 1], [2, 0], [0, 3]], 40, 2)
    assert count >= (2 if context == "none" else 1)  # a drawn context seldom stays


def test_an_id_without_a_row_is_reported_as_ever():
    data = data_config("none", MODE, positive=(), max_history_tokens=60)
    config = train_config(data, num_layers=2, hstu=HSTU, encoding=STILL)
    scorer = make_scorer(config, 40)
    world = World(config, 2, [5])
    for known in (True, False):
        requests = world.requests()
        candidates = world.candidates(requests, [3])
        if known:
            scorer.answer(requests, candidates)
            world.grow([2])
            continue
        candidates.ints[1, 0] = 10 * NUM_ITEMS
        with pytest.raises(ValueError, match=r"feature 'item_id'.*sequence 0"):
            scorer.answer(requests, candidates)
    assert pages_in_use(scorer) == 0


class OnDevice(TableLookup):
    """Rows of the run's tables on the GPU."""

    def __init__(self, config):
        self.find, self.tables = make_lookup(config, torch.float32), make_tables(config)
        self.config = config

    def __call__(self, batch):
        batch, rows = self.find(batch)
        return batch.to(torch.device("cuda")), {k: v.to("cuda") for k, v in rows.items()}

    def local(self, features):
        weights = {
            feature: (name, self.tables.local_weight(name).to("cuda"))
            for name, table in self.config.embeddings.tables.items()
            for feature in {*table.features} & {*features}
        }
        return LocalRows(Vocabulary(self.config.embeddings), weights)


@pytest.mark.gpu
@pytest.mark.parametrize("bias", ["none", "position_time"])
def test_graphs_in_bfloat16(bias):
    """Answers to requests of users who go on, against passes of the training code in bfloat16."""
    data = data_config("none", MODE, positive=(), max_history_tokens=900)
    shape = Shape(dim=64, num_heads=2, num_layers=2)
    hstu = replace(shape.hstu(300).hstu, final_norm=True, bias=bias)
    encoding = EncodingConfig(position="from_start", position_buckets=900, gap="log")
    config = train_config(data, dim=64, num_layers=2, hstu=hstu, encoding=encoding)
    config = replace(config, precision="bf16")
    model = make_model(config).to("cuda", torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    exact = make_model(config)
    exact.load_state_dict({k: v.double().cpu() for k, v in model.state_dict().items()})
    lookup = OnDevice(config)
    scorer = Scorer(config, model, lookup, torch.device("cuda"), cache_bytes=60 * page_of(config))
    assert scorer.next is not None
    world = World(config, 3, [200, 90])
    for _ in range(4):
        requests = world.requests()
        candidates = world.candidates(requests, [20, 9])
        encoded, found = scorer.answer(requests, candidates)
        again = scorer.score(encoded, candidates, microbatch=8)
        fp64, vectors = alone(config, exact, make_lookup(config), requests, candidates)
        with torch.autocast("cuda", torch.bfloat16):
            same, same_vectors = alone(config, model, lookup, requests, candidates)
        pairs = [(encoded.user_vectors, same_vectors[[0, 20]], vectors[[0, 20]])]
        for name in config.data.tasks:
            pairs += [(x.ranking[name], same[name], fp64[name]) for x in (found, again)]
        for got, in_training, true in pairs:
            # Of many numbers together: either error is a matter of chance in a single one.
            allowed = 2 * (error(in_training, true) + torch.finfo(torch.bfloat16).eps)
            assert error(got, true) <= allowed
        del encoded
        world.grow([9, 9])
    assert scorer.next._graphs
    # Microbatches of one request that one graph makes, on several streams.
    world = World(config, 4, [150])
    requests = world.requests()
    candidates = world.candidates(requests, [70])
    encoded, expected = scorer.answer(requests, candidates)
    for _ in range(3):
        found = scorer.score(encoded, candidates, microbatch=16)
        for name, x in found.ranking.items():
            assert error(x, expected.ranking[name].double().cpu()) <= 2e-2
    assert any(size.runs > 1 for size in scorer.passes.graphs[0]._graphs)


def error(got, true):
    return ((got.double().cpu() - true).norm() / true.norm()).item()
