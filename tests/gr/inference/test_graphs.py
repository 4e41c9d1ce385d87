"""Passes as graphs read them, run without a graph: padding changes nothing."""

import numpy as np
import pytest
import torch

from gr.config import EncodingConfig, HSTUConfig, RotaryConfig
from gr.inference import graphs, tails
from gr.inference.cache import KeyValueStore, LayerShape
from gr.inference.graphs import runs_alike
from gr.inference.mfalcon import Scorer
from tests.gr.batches import data_config, train_config
from tests.gr.inference.drawn import World, make_lookup, make_model, page_of

HSTU = HSTUConfig(
    num_heads=2, qk_dim=4, v_dim=4, scaling_length=8, bias="position_time",
    rotary=RotaryConfig(angles="sum"), final_norm=True,
)  # fmt: skip


class Replayed(graphs.PassGraphs):
    """Runs on a CPU what a graph would run."""

    def takes(self, given, runs=1):
        super().takes(given, runs)
        return super().takes(given, runs)  # as if it had been seen

    def run(self, x_RD, given, runs=1):
        if runs > 1:
            return torch.cat([self.run(x, given) for x in x_RD.chunk(runs)])
        info, layout, rows = given.info, given.layouts[0], len(x_RD)
        pages = -(-layout.max_len // graphs.PAGE) + 3 if layout.max_len else 0
        size = graphs.Size(
            rows=rows + 5,
            sequences=1 << (len(info.offsets) - 2).bit_length(),
            pages=pages,
            keeps=layout.rows is not None,
            of_tails=given.of_tails,
            windowed=given.windowed_candidates,
            num_context=info.num_context,
        )
        numbers = np.full(graphs._total(size), -1, np.int64)
        graphs._fill(numbers, size, given, rows)
        x = torch.randn(size.rows, x_RD.shape[1], dtype=x_RD.dtype)
        x[:rows] = x_RD
        static = graphs._static(size, torch.from_numpy(numbers))
        y = self.stack.run(x, static, self.store)
        self.count = getattr(self, "count", 0) + 1
        return y[: graphs.TAIL if given.of_tails else rows]


@pytest.mark.parametrize("as_tails", [False, True])
@pytest.mark.parametrize("lengths", [[6], [5, 9, 0]])
def test_what_is_left_over_changes_nothing(lengths, as_tails, monkeypatch):
    monkeypatch.setattr(tails, "is_faster", lambda *_, **__: as_tails)
    mode = ("interleaved", "event", "session", "none")
    data = data_config("none", mode, positive=(), max_history_tokens=60)
    encoding = EncodingConfig(position="from_start", position_buckets=60, gap="log")
    config = train_config(data, num_layers=2, hstu=HSTU, encoding=encoding)
    model, lookup = make_model(config), make_lookup(config)
    budget = 30 * page_of(config)
    plain, padded = (
        Scorer(config, model, lookup, torch.device("cpu"), cache_bytes=budget) for _ in range(2)
    )
    padded.passes.graphs = [Replayed(padded.stacks[0], padded.users.stores[0])]
    microbatch = 5 if len(lengths) == 1 else 1024
    world = World(config, 1, lengths)
    for _ in range(3):
        requests = world.requests()
        candidates = world.candidates(requests, [14] * len(lengths))
        (one, expected), (two, got) = (
            s.answer(requests, candidates, microbatch=m)
            for s, m in ((plain, 1024), (padded, microbatch))
        )
        assert one.reused.tolist() == two.reused.tolist()
        torch.testing.assert_close(two.user_vectors, one.user_vectors, rtol=1e-9, atol=1e-9)
        for name, x in got.ranking.items():
            torch.testing.assert_close(x, expected.ranking[name], rtol=1e-9, atol=1e-9)
        del one, two
        world.grow([3] * len(lengths))
    assert padded.passes.graphs[0].count >= 3


def test_microbatches_that_one_graph_makes():
    assert [runs_alike(np.array([14]), begin, 5) for begin in (0, 5, 10)] == [2, 1, 1]
    assert runs_alike(np.array([16_385]), 0, 1024) == graphs.MOST_RUNS
    assert runs_alike(np.array([16_384, 16_384]), 0, 1024) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("width", "K"), [(24, 8), (25, 8), (24, 6)])
def test_rows_are_kept_to_the_bit(dtype, width, K):
    """Rows of a wider buffer, in words or, where it is not made of such, element by element."""
    store = KeyValueStore([LayerShape(2, K, K)], 2, dtype=dtype, device=torch.device("cpu"))
    buffer = torch.randn(5, width).to(dtype)
    k, v = (buffer[:, n : n + 2 * K].unflatten(1, (2, K)) for n in (0, 8))
    rows = torch.tensor([130, 200, 3, 255, 0])
    store.write(0, rows, k, v)
    expected = torch.zeros(256, 2, K, dtype=dtype)
    for kept, new in ((store.k[0], k), (store.v[0], v)):
        expected.zero_()[rows] = new
        assert torch.equal(kept, expected)
