"""Encodings of numbers against sorting what came before; bags are tested with the tokens."""

import bisect
import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gr.numbers import NUM_CELLS, NumberEncodings, RunningQuantiles, float_cell
from pipelines.config import FeatureConfig
from tests.dist import run_distributed

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def cell_edge(x):
    """Return the float32 nearest to zero that shares sign, exponent and 4 bits with x."""
    (bits,) = struct.unpack("I", struct.pack("f", x + 0.0))
    return struct.unpack("f", struct.pack("I", bits >> 19 << 19))[0]


@given(st.lists(FLOATS, min_size=1, max_size=30))
def test_cells_are_in_the_order_of_their_values(values):
    cells = float_cell(torch.tensor(values)).tolist()
    assert all(0 <= cell < NUM_CELLS for cell in cells)
    for x, cell in zip(values, cells, strict=True):
        for y, other in zip(values, cells, strict=True):
            if math.copysign(1, x + 0.0) == math.copysign(1, y + 0.0):
                assert (cell == other) == (cell_edge(x) == cell_edge(y))
            assert x >= y or cell <= other


@given(
    past=st.lists(st.lists(FLOATS | st.just(math.nan), max_size=20), max_size=4),
    values=st.lists(FLOATS | st.sampled_from([math.nan, math.inf]), min_size=1, max_size=9),
    bins=st.integers(2, 5),
)
@settings(deadline=None)
def test_quantile_bins_by_sorting(past, values, bins):
    module = RunningQuantiles(bins)
    for batch in past:
        module.add(module.statistics(torch.tensor(batch)))
    edges = lambda x: (math.copysign(1, x + 0.0), cell_edge(x))  # noqa: E731
    # Negative cells lie below the positive ones, -0.0 is 0.0.
    seen = sorted(edges(x) for batch in past for x in batch if not math.isnan(x))
    expected = []
    for x in values:
        if not math.isfinite(x):
            expected.append(0)
            continue
        below, up_to = bisect.bisect_left(seen, edges(x)), bisect.bisect_right(seen, edges(x))
        share = (below + up_to) / 2 / len(seen) if seen else 0.5
        expected.append(1 + min(bins - 1, math.floor(bins * share)))
    assert module(torch.tensor(values)).tolist() == expected


def test_quantile_bins_are_equally_full():
    g = np.random.default_rng(0)
    x = torch.tensor(g.lognormal(3.0, 2.0, 40_000), dtype=torch.float32)
    module = RunningQuantiles(8)
    for part in x.split(1000):
        module.add(module.statistics(part))
    share = torch.bincount(module(x), minlength=9)[1:] / len(x)
    assert ((share > 0.11) & (share < 0.14)).all()  # a cell is a sixteenth of its values wide


def encodings():
    features = {
        "price": FeatureConfig(encoding="zscore"),
        "age": FeatureConfig(encoding="quantile", bins=3),
    }
    torch.manual_seed(0)
    return NumberEncodings(features, 4)


def test_missing_is_a_value_of_its_own():
    module = encodings()
    module.observe({"price": torch.tensor([1.0, 5.0]), "age": torch.tensor([3.0])})
    for name in ("price", "age"):
        vectors = module.encode(name, torch.tensor([math.nan, 0.0, 1.0, 5.0, 100.0]))
        assert all(not torch.allclose(vectors[0], other) for other in vectors[1:])
    vectors.sum().backward()
    assert module.vectors["age"].weight.grad[0].abs().sum() > 0


def test_state_of_statistics_is_part_of_the_module():
    module = encodings()
    module.observe({"price": torch.tensor([1.0, 5.0, math.nan]), "age": torch.tensor([3.0, 9.0])})
    other = NumberEncodings({}, 4)
    with pytest.raises(RuntimeError, match="sums_3F"):
        other.load_state_dict(module.state_dict())
    other = encodings()
    before = other.encode("price", torch.tensor([4.0]))
    other.load_state_dict(module.state_dict())
    after = other.encode("price", torch.tensor([4.0]))
    assert not torch.equal(before, after)
    assert torch.equal(after, module.encode("price", torch.tensor([4.0])))


PARTS = [{"price": [1.0, 2.5], "age": [7.0]}, {"price": [9.0, math.nan], "age": []}]


def observe_on_two_ranks(parts):
    import torch.distributed as dist

    module = encodings()
    module.observe({name: torch.tensor(x) for name, x in parts[dist.get_rank()].items()})
    return module.state_dict()


def test_ranks_share_their_statistics():
    one = encodings()
    one.observe({name: torch.tensor(PARTS[0][name] + PARTS[1][name]) for name in ("price", "age")})
    for state in run_distributed(observe_on_two_ranks, 2, PARTS):
        for name, value in one.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-13, atol=0)
