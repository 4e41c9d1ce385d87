"""The same on a GPU: kernels, graphs, and caches across requests."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gr.bench_encoders import Shape
from gr.config import EncodingConfig, RotaryConfig, SemiLocalConfig
from gr.inference import Candidates, Scorer, bench, tails
from tests.gr.batches import data_config, train_config
from tests.gr.inference.drawn import World, alone, make_lookup, make_model, page_of, runs
from tests.gr.inference.test_mfalcon import COUNTS

OPTIONS = {
    "plain": {},
    "bias": {"bias": "position_time"},
    "window": {"semi_local": SemiLocalConfig(window=40, global_columns=5)},
    "rotary": {"rotary": RotaryConfig(angles="sum")},
    "softmax": {"attention": "softmax"},
    "fp8": {"precision": "fp8"},
}


def on_device(config, dtype, **options):
    """Return the model, the lookup and a scorer on the GPU."""
    model = make_model(config).to("cuda", dtype)
    rows_of = make_lookup(config, torch.float32)

    def lookup(batch):
        batch, rows = rows_of(batch)
        return batch.to(torch.device("cuda")), {k: v.to("cuda", dtype) for k, v in rows.items()}

    return model, lookup, Scorer(config, model, lookup, torch.device("cuda"), **options)


@pytest.mark.gpu
@settings(deadline=None, max_examples=12)  # each compiles much
@given(runs(), COUNTS, st.integers(1, 5), st.integers(0, 99))
def test_drawn_runs_in_float32(config, counts, microbatch, seed):
    history, items = zip(*counts, strict=True)
    world = World(config, seed, history)
    requests = world.requests()
    candidates = world.candidates(requests, items)
    _, _, scorer = on_device(config, torch.float32)
    encoded = scorer.encode_history(requests)
    if not sum(items):
        return
    ranking, vectors = alone(config, make_model(config), make_lookup(config), requests, candidates)
    owner = torch.repeat_interleave(torch.tensor(items))
    close(encoded.user_vectors.cpu()[owner], vectors)
    if config.data.tasks:
        found = scorer.score(encoded, candidates, microbatch=microbatch)
        for name, x in found.ranking.items():
            close(x.cpu(), ranking[name])


def close(got, expected):
    scale = expected.abs().max().item() + 1
    assert (got.double() - expected.double()).abs().max().item() <= 1e-5 * scale


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_requests_that_go_on_in_bfloat16(options, graphs):
    """Scores of three requests of one user, against passes of the training code in bfloat16."""
    data = data_config(
        "none", ("interleaved", "event", "session", "none"), positive=(), max_history_tokens=900
    )
    shape = Shape(dim=64, num_heads=2, num_layers=3)
    hstu = replace(shape.hstu(300).hstu, final_norm=True)
    encoding = EncodingConfig(position="from_start", position_buckets=900, gap="log")
    config = train_config(data, dim=64, num_layers=3, hstu=hstu, encoding=encoding)
    changed = replace(config.model, hstu=replace(hstu, **options))
    config = replace(config, precision="bf16", model=changed)
    # What fp8 rounds is an error like any other: the exact one has none of it.
    plain = {k: v for k, v in options.items() if k != "precision"}
    true_config = replace(config, model=replace(config.model, hstu=replace(hstu, **plain)))
    world = World(config, 3, [200])
    budget = 30 * page_of(true_config)
    model, lookup, scorer = on_device(config, torch.float32, cache_bytes=budget, graphs=graphs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    scorer.refresh()
    exact = make_model(true_config)
    exact.load_state_dict({k: v.double().cpu() for k, v in model.state_dict().items()})
    taken = []
    for step in range(4):
        requests = world.requests()
        candidates = world.candidates(requests, [70])
        encoded = scorer.encode_history(requests)
        assert (encoded.reused[0] > 0) == (step > 0), encoded.reasons
        found = scorer.score(encoded, candidates, microbatch=32)
        few = Candidates(np.array([24]), candidates.ints[:24], candidates.floats[:24])
        fp64, vectors = alone(true_config, exact, make_lookup(config), requests, few)
        with torch.autocast("cuda", torch.bfloat16):
            same, same_vectors = alone(config, model, lookup, requests, few)
        pairs = [(found.ranking[n][:24], same[n], fp64[n]) for n in config.data.tasks]
        for got, in_training, true in [
            *pairs,
            (encoded.user_vectors[0], same_vectors[0], vectors[0]),
        ]:
            # Of many numbers together: either error is a matter of chance in a single one.
            allowed = 2 * (error(in_training, true) + torch.finfo(torch.bfloat16).eps)
            assert error(got, true) <= allowed, (error(got, true), allowed, step)
        del encoded
        world.grow([9])
        # Memory that a graph reads and nobody holds would be this.
        taken = [
            torch.full((n,), -1, device="cuda") for n in (64, 256, 1024, 4096) for _ in range(9)
        ]
    assert all(bool((x == -1).all()) for x in taken)
    if graphs:
        assert scorer.passes.graphs[0]._graphs


@pytest.mark.gpu
@pytest.mark.parametrize("bias", ["none", "position_time"])
def test_thousands_of_candidates_in_bfloat16(bias, monkeypatch):
    """As tails of a whole sequence, against the pages; some against passes of the training code."""
    mode = ("interleaved", "event", "session", "none")
    data = data_config("none", mode, positive=(), max_history_tokens=900)
    hstu = replace(Shape(dim=64, num_heads=2).hstu(300).hstu, final_norm=True, bias=bias)
    encoding = EncodingConfig(position="from_start", position_buckets=900)
    config = train_config(data, dim=64, num_layers=2, hstu=hstu, encoding=encoding)
    config = replace(config, precision="bf16")
    world = World(config, 3, [190])
    model, lookup, scorer = on_device(config, torch.float32, cache_bytes=60 * page_of(config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    scorer.refresh()
    requests = world.requests()
    candidates = world.candidates(requests, [4700])
    encoded = scorer.encode_history(requests)
    calls = []
    real = tails.attention_of_tails
    monkeypatch.setattr(
        tails, "attention_of_tails", lambda *a, **k: (calls.append(len(a[0])), real(*a, **k))[1]
    )
    few = Candidates(np.array([16]), candidates.ints[:16], candidates.floats[:16])
    exact = make_model(config)
    exact.load_state_dict({k: v.double().cpu() for k, v in model.state_dict().items()})
    fp64, _ = alone(config, exact, make_lookup(config), requests, few)
    with torch.autocast("cuda", torch.bfloat16):
        same, _ = alone(config, model, lookup, requests, few)
    by_pages = scorer.score(encoded, candidates, microbatch=1000).ranking
    assert not calls
    # The rest by pages, one pass left over, two in a graph; all in one, plainly and as a graph;
    # four in a graph, which are tails since they run beside each other.
    for microbatch in (4096, 2300, 2300, 16384, 16384, 1000, 1000):
        found = scorer.score(encoded, candidates, microbatch=microbatch).ranking
        for name, x in found.items():
            assert error(x, by_pages[name].double().cpu()) <= 1e-2
            allowed = 2 * (error(same[name], fp64[name]) + torch.finfo(torch.bfloat16).eps)
            assert error(x[:16], fp64[name]) <= allowed
    assert set(calls) >= {4096, 2300, 2560, 4700, 5120, 1024}


def error(got, true):
    return ((got.double().cpu() - true).norm() / true.norm()).item()


def test_measurements_run_on_a_small_model():
    shape = Shape(dim=16, num_heads=2, num_layers=2, device="cpu")
    for name, measure in bench.MEASUREMENTS.items():
        figures = measure(shape)
        assert all(value >= 0 for value in figures.values()), name
