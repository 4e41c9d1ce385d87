"""DLRM against explicit loops, and its standardisation against what earlier batches held."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gr.baselines.dlrm import DLRM
from gr.config import DLRMConfig
from gr.numbers import RunningStandardization, sum_over_ranks
from tests.dist import run_distributed

DIMS = {"item_id": 4, "author": 6, "country": 4}
CONFIG = DLRMConfig(bottom=(5, 3), top=(7, 2))


def relu_layers(module, x):
    for layer in module:
        if isinstance(layer, torch.nn.Linear):
            x = layer.weight @ x + layer.bias
            x = torch.where(x > 0, x, 0.0)
    return x


def by_loops(model, dense, features, p):
    """One position, with statistics at their start: mean 0, deviation 1."""
    vectors = []
    for name, rows in features.items():
        weight = model.project[name].weight if name in model.project else None
        vectors.append(rows[p] if weight is None else weight @ rows[p])
    first = []
    if model.bottom is not None:
        values, flags = [], []
        for value in dense[p].tolist():
            missing = math.isnan(value)
            values.append(0.0 if missing else math.copysign(math.log1p(abs(value)), value))
            flags.append(float(missing))
        x = relu_layers(model.bottom[0], torch.tensor(values + flags, dtype=torch.float64))
        x = model.bottom[1].weight @ x + model.bottom[1].bias
        vectors.insert(0, x)
        first = [x]
    dots = [
        (vectors[i] * vectors[j]).sum().reshape(1) for i in range(len(vectors)) for j in range(i)
    ]
    return relu_layers(model.top, torch.cat(first + dots))


@pytest.mark.parametrize("num_dense", [0, 1, 3])
@pytest.mark.parametrize("bottom", [(), (5, 3)])
def test_dlrm_equals_loops_in_value_and_gradients(num_dense, bottom):
    torch.manual_seed(0)
    config = DLRMConfig(bottom=bottom, top=(7, 6))
    model = DLRM(config, num_dense=num_dense, feature_dims=DIMS, dim=4).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    dense = torch.randn(6, num_dense, dtype=torch.float64) * 20
    dense[0] = math.nan
    features = {
        name: torch.randn(6, width, dtype=torch.float64, requires_grad=True)
        for name, width in DIMS.items()
    }
    # In training, and yet the first batch meets untouched statistics.
    actual = model(dense, features)
    expected = torch.stack([by_loops(model, dense, features, p) for p in range(6)])
    assert actual.shape == (6, 6)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert (actual > 0).any()
    inputs = (*features.values(), *model.parameters())
    for a, b in zip(
        torch.autograd.grad(actual.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_dlrm_takes_no_rows():
    model = DLRM(CONFIG, num_dense=3, feature_dims=DIMS, dim=4)
    features = {name: torch.empty(0, width) for name, width in DIMS.items()}
    y = model(torch.empty(0, 3), features)
    assert y.shape == (0, 2)
    y.sum().backward()


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="at least two vectors"):
        DLRM(CONFIG, num_dense=0, feature_dims={"item_id": 4}, dim=4)
    with pytest.raises(ValueError, match=r"model\.dlrm\.top"):
        DLRMConfig(top=())
    with pytest.raises(ValueError, match=r"model\.dlrm\.top"):
        DLRMConfig(bottom=(4, 0))


def expected_standardization(earlier, batch):
    """From all values of earlier batches, by numpy."""
    result = np.zeros((len(batch), 2 * batch.shape[1]))
    for f in range(batch.shape[1]):
        past = np.concatenate([b[:, f] for b in earlier]) if earlier else np.empty(0)
        past = past[np.isfinite(past)]
        past = np.sign(past) * np.log1p(np.abs(past))
        mean = past.mean() if len(past) else 0.0
        has_varied = len(past) > 0 and past.var() > 1e-9 * (past**2).mean()
        deviation = past.std() if has_varied else 1.0
        for p, value in enumerate(batch[:, f]):
            if np.isfinite(value):
                v = math.copysign(math.log1p(abs(value)), value)
                result[p, f] = min(10.0, max(-10.0, (v - mean) / deviation))
            else:
                result[p, batch.shape[1] + f] = 1.0
    return result


def counters(seed, num, missing=0.2):
    g = np.random.default_rng(seed)
    x = np.stack([g.geometric(0.01, num), g.normal(size=num), np.full(num, 7.0)], 1)
    x[g.random(x.shape) < missing] = np.nan
    return x


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=6), st.integers(0, 1000))
def test_standardization_knows_earlier_batches_only(sizes, seed):
    module = RunningStandardization(3)
    batches = [counters(seed + i, size) for i, size in enumerate(sizes)]
    for i, batch in enumerate(batches):
        got = module(torch.tensor(batch))
        assert torch.equal(module(torch.tensor(batch)), got)  # only `add` adds
        module.add(module.statistics(torch.tensor(batch)))
        expected = expected_standardization(batches[:i], batch)
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9, atol=1e-9)


def test_standardization_state_and_odd_values():
    module = RunningStandardization(3)
    for seed in range(3):
        module.add(module.statistics(torch.tensor(counters(seed, 50)).float()))
    restored = RunningStandardization(3)
    restored.load_state_dict(module.state_dict())
    odd = torch.tensor([[math.inf, -math.inf, math.nan], [1e30, -1e30, 8.0], [0.0, 0.0, 7.0]])
    expected = module.eval()(odd)
    assert torch.equal(restored.eval()(odd), expected)
    assert expected.dtype == torch.float32
    assert expected[0].tolist() == [0, 0, 0, 1, 1, 1]
    # A feature that has never varied is only centred.
    assert expected[1, 2].item() == pytest.approx(math.log1p(8) - math.log1p(7))
    assert expected[1, :2].tolist() == [10.0, -10.0]
    assert expected.isfinite().all()


def standardize_on_two_ranks(batches):
    import torch.distributed as dist

    module = RunningStandardization(3)
    for batch in batches:
        (total,) = sum_over_ranks([module.statistics(torch.tensor(batch[dist.get_rank()]))])
        module.add(total)
    return module.sums_3F


def test_ranks_share_their_statistics():
    # Rank 1 has nothing in the second batch.
    batches = [(counters(0, 6), counters(1, 9)), (counters(2, 5), counters(3, 0))]
    one = RunningStandardization(3)
    for pair in batches:
        one.add(one.statistics(torch.tensor(np.concatenate(pair))))
    for sums in run_distributed(standardize_on_two_ranks, 2, batches):
        torch.testing.assert_close(sums, one.sums_3F, rtol=1e-13, atol=0)
