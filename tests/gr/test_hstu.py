import math
from dataclasses import replace

import pytest
import torch

from gr.config import (
    HSTUConfig,
    ModelConfig,
    RotaryConfig,
    SemiLocalConfig,
    TruncationConfig,
)
from gr.hstu import HSTUEncoder
from gr.rotary import time_angles
from tests.gr import hstu_oracle
from tests.gr.hstu_oracle import make_info, make_sequences

DIM = 6
SMALL = {"num_heads": 2, "qk_dim": 4, "v_dim": 3, "scaling_length": 5}

OPTIONS = {
    "paper": {},
    "u_only": {"uvqk_activation": "u_only"},
    "no_uvqk_bias": {"uvqk_bias": False},
    "alpha": {"alpha": 0.7},
    "scaling": {"scaling_length": 40},
    "softmax": {"attention": "softmax"},
    "position": {"bias": "position"},
    "position_time": {"bias": "position_time"},
    "short_tables": {"bias": "position_time", "bias_max_len": 2, "bias_time_buckets": 20},
    "group": {"norm": "group"},
    "affine": {"norm_affine": True},
    "concat_ua": {"concat_ua": True},
    "final_norm": {"final_norm": True},
    "one_head": {"num_heads": 1},
    "dlrm_v3": {
        "uvqk_activation": "u_only",
        "norm": "group",
        "norm_affine": True,
        "concat_ua": True,
    },
    "softmax_rab": {"attention": "softmax", "bias": "position_time", "concat_ua": True},
    "u_only_rab": {"uvqk_activation": "u_only", "bias": "position", "uvqk_bias": False},
    "rotary_position": {"rotary": RotaryConfig(angles="position")},
    "rotary_time": {"rotary": RotaryConfig(angles="time", periods=(3.0, 2e6))},
    "rotary_sum": {"rotary": RotaryConfig(angles="sum"), "concat_ua": True},
    "rotary_dims": {"rotary": RotaryConfig(angles="split_dims"), "attention": "softmax"},
    "rotary_heads": {"rotary": RotaryConfig(angles="split_heads"), "bias": "position_time"},
    "window": {"semi_local": SemiLocalConfig(window=1), "bias": "position"},
    "global_columns": {"semi_local": SemiLocalConfig(window=1, global_columns=1)},
    "global_rows": {
        "semi_local": SemiLocalConfig(window=1, global_rows=2),
        "attention": "softmax",
    },
    "group_rab": {"norm": "group", "bias": "position_time", "norm_affine": True, "alpha": 1.3},
}

ULTRA = {
    "semi_local": SemiLocalConfig(window=2, global_rows=1, global_columns=1),
    "truncation": TruncationConfig(layers=1, history=2),
}

# lengths, tails, candidates, context tokens. Tails reach into context, history and candidates.
STRUCTURES = {
    "plain": ([4, 1, 0, 3, 2], [2, 1, 0, 3, 0], None, 0),
    "context": ([5, 2, 3], [5, 0, 1], None, 2),
    "candidates": ([4, 5, 1], [2, 3, 1], [2, 3, 1], 0),
    "context_and_candidates": ([6, 3, 5], [3, 3, 0], [3, 1, 0], 2),
    "long_history": ([8, 7, 2], [2, 3, 1], [2, 0, 1], 1),
}


def make_encoder(options, num_layers=2, seed=0, dim=DIM, start=None):
    """Return (config, encoder in float64). Weights are large, so that no term hides; `start` keeps
    those of the constructor."""
    torch.manual_seed(seed)
    config = ModelConfig(dim=dim, num_layers=num_layers, hstu=HSTUConfig(**SMALL | options))
    encoder = HSTUEncoder(config).double()
    if start is None:
        for parameter in encoder.parameters():
            torch.nn.init.normal_(parameter, std=0.6)
    return config, encoder


def make_batch(structure, seed=0, dim=DIM):
    lengths, tails, candidates, num_context = STRUCTURES[structure]
    sequences = make_sequences(lengths, tails, candidates, seed=seed)
    torch.manual_seed(seed + 1)
    x_LD = torch.randn(sum(lengths), dim, dtype=torch.float64)
    return sequences, num_context, x_LD


def assert_equal_fp64(actual, expected, times=2000.0):
    """Both were computed in float64 from numbers near 1, in another order: some rounding apart."""
    assert actual.shape == expected.shape
    # Not below 1: what is zero but for rounding (q's gradient under a softmax of one key) is noise.
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 0.0
    worst = (actual - expected).abs().max().item() if expected.numel() else 0.0
    assert worst <= times * torch.finfo(torch.float64).eps * scale


def assert_matches_oracle(config, encoder, sequences, num_context, x_LD):
    parameters = {
        name: p.detach().clone().requires_grad_() for name, p in encoder.named_parameters()
    }
    x_actual, x_expected = (x_LD.clone().requires_grad_() for _ in range(2))
    info = make_info(sequences, num_context, keep_history=config.hstu.truncation.history)
    actual = encoder(x_actual, info)
    expected = hstu_oracle.encoder(x_expected, sequences, num_context, config, parameters)
    assert_equal_fp64(actual, expected)

    weights = torch.randn(expected.shape, dtype=torch.float64)
    encoder.zero_grad()
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_equal_fp64(x_actual.grad, x_expected.grad)
    for name, parameter in encoder.named_parameters():
        # A parameter that the loops never touch has no gradient there and must have zero here.
        gradient = parameters[name].grad
        assert_equal_fp64(
            parameter.grad, torch.zeros_like(parameter) if gradient is None else gradient
        )


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("options", OPTIONS)
def test_matches_the_equations(options, structure):
    config, encoder = make_encoder(OPTIONS[options])
    assert_matches_oracle(config, encoder, *make_batch(structure))


@pytest.mark.parametrize("num_layers", [1, 3])
def test_matches_the_equations_at_other_depths(num_layers):
    config, encoder = make_encoder({"bias": "position_time"}, num_layers)
    assert_matches_oracle(config, encoder, *make_batch("context_and_candidates"))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("options", ["position_time", "rotary_dims", "global_rows", "dlrm_v3"])
@pytest.mark.parametrize(("layers", "history"), [(1, 1), (2, 1), (2, 3)])
def test_truncated_layers_match_the_equations(structure, options, layers, history):
    truncation = TruncationConfig(layers=layers, history=history)
    config, encoder = make_encoder({**OPTIONS[options], "truncation": truncation}, num_layers=3)
    assert_matches_oracle(config, encoder, *make_batch(structure))


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_matches_the_equations_where_eps_counts(norm):
    """With weights of N(0, .02) the variance of A V is far below eps."""
    config, encoder = make_encoder({"norm": norm, "scaling_length": 256}, start="constructor")
    assert_matches_oracle(config, encoder, *make_batch("plain"))


def test_float32_is_close_to_the_equations():
    _, encoder = make_encoder(OPTIONS["group_rab"])
    sequences, num_context, x_LD = make_batch("context_and_candidates")
    expected = encoder(x_LD, make_info(sequences, num_context))
    actual = encoder.float()(x_LD.float(), make_info(sequences, num_context))
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


def test_autocast_keeps_the_residual_in_float32():
    _, encoder = make_encoder(OPTIONS["dlrm_v3"])
    sequences, num_context, x_LD = make_batch("context_and_candidates")
    expected = encoder(x_LD, make_info(sequences, num_context))
    encoder.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = encoder(x_LD.float(), make_info(sequences, num_context))
    assert actual.dtype == torch.float32
    assert (actual.double() - expected).abs().max() < 0.05 * expected.abs().max()
    actual.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in encoder.parameters())


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
@pytest.mark.parametrize("options", OPTIONS)
def test_an_empty_batch_gives_every_parameter_a_gradient_of_zero(options, lengths):
    """A rank without sequences takes part in the sum of gradients."""
    _, encoder = make_encoder(OPTIONS[options])
    x_LD = torch.zeros(0, DIM, dtype=torch.float64)
    y_RD = encoder(x_LD, make_info(make_sequences(lengths, lengths)))
    assert y_RD.shape == (0, DIM)
    y_RD.sum().backward()
    for parameter in encoder.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


@pytest.mark.parametrize("angles", ["position", "time", "sum", "split_dims", "split_heads"])
def test_rotary_angles_count_differences_only(angles):
    """Years later, the same sequence gives the same result to the bit; other gaps do not."""
    _, encoder = make_encoder({"rotary": RotaryConfig(angles=angles)})
    sequences, num_context, x_LD = make_batch("candidates")
    info = make_info(sequences, num_context)
    years = 10**8 + 7
    later = replace(info, timestamp=info.timestamp + years, query_time=info.query_time + years)
    assert torch.equal(encoder(x_LD, later), encoder(x_LD, info))
    slower = replace(info, query_time=info.query_time + 1000)
    assert torch.equal(encoder(x_LD, slower), encoder(x_LD, info)) == (angles == "position")


def test_time_angles_have_the_periods_that_were_asked_for():
    angle_LP = time_angles(torch.tensor([0, 60, 90, 3600 * 24]), 6, (60.0, 86_400.0))
    turns = angle_LP / (2 * math.pi)
    whole_days = (60 * 86_400) ** 0.5  # of the middle period
    expected = [
        [0, 0, 0],
        [0, 60 / whole_days, 60 / 86_400],
        [0.5, 90 / whole_days, 90 / 86_400],
        [0, 86_400 / whole_days % 1, 0],
    ]
    torch.testing.assert_close(turns, torch.tensor(expected, dtype=torch.float64))


def test_weights_start_as_in_the_research_code():
    torch.manual_seed(0)
    config = HSTUConfig(num_heads=4, qk_dim=32, v_dim=64, bias="position_time", norm_affine=True)
    encoder = HSTUEncoder(ModelConfig(dim=128, num_layers=1, hstu=config))
    state = encoder.state_dict()
    assert state["layers.0.uvqk_weight"].shape == (128, 4 * (2 * 32 + 2 * 64))
    for name in ("uvqk_weight", "position_bias", "time_bias"):
        values = state[f"layers.0.{name}"]
        assert values.mean().abs() < 4 * 0.02 / values.numel() ** 0.5
        assert values.std().item() == pytest.approx(0.02, rel=4 / (2 * values.numel()) ** 0.5)
    bound = (6 / (128 + 4 * 64)) ** 0.5
    output = state["layers.0.output.weight"]
    assert 0.99 * bound < output.abs().max() <= bound
    assert output.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not state["layers.0.uvqk_bias"].any()
    assert not state["layers.0.output.bias"].any()
    assert (state["layers.0.attention_norm.weight"] == 1).all()
    assert not state["layers.0.attention_norm.bias"].any()


def test_state_dict_has_plain_names():
    """Checkpoints hold these names."""
    options = {"bias": "position_time", "norm_affine": True, "final_norm": True}
    _, encoder = make_encoder(options, num_layers=1)
    assert set(encoder.state_dict()) == {
        "layers.0.uvqk_weight",
        "layers.0.uvqk_bias",
        "layers.0.position_bias",
        "layers.0.time_bias",
        "layers.0.input_norm.weight",
        "layers.0.input_norm.bias",
        "layers.0.attention_norm.weight",
        "layers.0.attention_norm.bias",
        "layers.0.output.weight",
        "layers.0.output.bias",
        "final_norm.weight",
        "final_norm.bias",
    }
    _, plain = make_encoder({"uvqk_bias": False}, num_layers=1)
    assert set(plain.state_dict()) == {
        "layers.0.uvqk_weight",
        "layers.0.output.weight",
        "layers.0.output.bias",
    }


def test_dropout_comes_before_the_output_projection():
    p = 0.4
    options = {"dropout": p, "v_dim": 32, "num_heads": 2}
    _, encoder = make_encoder(options, num_layers=1, dim=64)
    layer = encoder.layers[0]
    with torch.no_grad():
        layer.output.weight.copy_(torch.eye(64))
    info = make_info(make_sequences([40], [40]))
    x_LD = torch.randn(40, 64, dtype=torch.float64)
    without = (encoder.eval()(x_LD, info) - x_LD - layer.output.bias).detach()
    encoder.train()
    torch.manual_seed(7)
    first = encoder(x_LD, info)
    torch.manual_seed(7)
    assert torch.equal(first, encoder(x_LD, info))  # the default generator decides
    dropped = (first - x_LD - layer.output.bias).detach()
    zero = dropped.abs() < 1e-12
    assert zero.double().mean().item() == pytest.approx(p, abs=0.04)
    assert_equal_fp64(torch.where(zero, 0.0, dropped), torch.where(zero, 0.0, without / (1 - p)))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_heads", 0),
        ("qk_dim", 0),
        ("v_dim", -1),
        ("scaling_length", 0),
        ("alpha", -0.5),
        ("alpha", float("inf")),
        ("alpha", float("nan")),
        ("bias_max_len", 0),
        ("bias_time_buckets", 0),
        ("dropout", 1.0),
        ("dropout", -0.1),
    ],
)
def test_impossible_settings_are_refused(setting, value):
    with pytest.raises(ValueError, match=rf"model\.hstu\.{setting} must"):
        HSTUConfig(**{setting: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"qk_dim": 5}, "qk_dim must be even"),
        ({"num_heads": 1, "rotary": RotaryConfig(angles="split_heads")}, "num_heads of 2 or more"),
        ({"qk_dim": 2, "rotary": RotaryConfig(angles="split_dims")}, "4 or more"),
    ],
)
def test_rotary_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        HSTUConfig(**({"rotary": RotaryConfig(angles="sum")} | settings))
    with pytest.raises(ValueError, match="the shorter first"):
        RotaryConfig(periods=(10.0, 5.0))
