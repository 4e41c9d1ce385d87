"""The layer of kernels: against its reference, with whatever it recomputes, and what it keeps."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.hstu_attention import AttentionMask
from kernels.hstu_layer import RECOMPUTABLE, RECOMPUTED, LayerWeights, hstu_layer
from kernels.hstu_layer._triton import silu_bwd, silu_bwd_fp8
from tests.checks import assert_within_reference_error
from tests.kernels.evaluate import poisoned_memory
from tests.kernels.hstu_layer_cases import OPTIONS, Layer, make_layer, pairwise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = pairwise(OPTIONS)
cases = pytest.mark.parametrize(
    "options", CASES, ids=lambda options: "-".join(map(str, options.values()))
)


def largest_error(x, exact):
    return float((x.double() - exact).abs().max())


def check(layer, dtype, device, impl="triton", **options):
    with poisoned_memory(torch.device(device)):
        got = layer.run(dtype, device, impl=impl, **options)
    low = layer.run(dtype, device, impl="reference", **options)
    precise = partial(layer.run, torch.float64, device, impl="reference", rounded_to=dtype)
    high = precise(**options)
    # Rows that hardly vary are magnified by up to 1 / sqrt(eps) of the norm. What float32 errs by
    # there depends on the order of sums: by what inputs are off already, at least.
    nudged = [precise(nudge=seed, **options) for seed in (1, 2) if dtype == torch.float32]
    for name, exact in high.items():
        assert got[name].dtype == dtype
        assert got[name].shape == exact.shape
        cancels = dtype != torch.float32 or layer.attention == "softmax"
        if exact.numel() and not (name.endswith("_table") and cancels):
            # Gradients pass eight operators, each of which rounds in an order of its own.
            times = 2.0 if name == "y" else 5.0
            errs = partial(largest_error, exact=exact)
            worst = max((low[name], *(x[name] for x in nudged)), key=errs)
            assert_within_reference_error(got[name], worst, exact, times=times)
        else:
            # Tables: sums over many pairs that cancel, which the tests of hstu_attention bound by
            # the magnitudes of their terms.
            assert torch.isfinite(got[name]).all()


@pytest.mark.interpret
@cases
def test_equals_the_reference(options, device):
    check(make_layer(**options), torch.float32, device)


def test_options_meet_in_pairs():
    for a, b in ((a, b) for a in OPTIONS for b in OPTIONS if a < b):
        met = {(case[a], case[b]) for case in CASES}
        assert met == {(x, y) for x in OPTIONS[a] for y in OPTIONS[b]}


@pytest.mark.interpret
@settings(max_examples=3, deadline=None)
@given(st.sampled_from(CASES), st.lists(st.sampled_from([0, 1, 15, 17]), max_size=2))
def test_equals_the_reference_in_half_precision(options, lengths):
    options = {name: value for name, value in options.items() if name != "structure"}
    tails = [length // 2 for length in lengths]
    check(Layer(lengths, tails, [0] * len(lengths), **options), torch.float16, DEVICE)


@pytest.mark.interpret
@pytest.mark.parametrize(("dtype", "has_tail"), [(torch.float16, True), (torch.float32, False)])
def test_turns_heads_of_any_even_dim(dtype, has_tail, device):
    shape = {"num_heads": 3, "qk_dim": 20, "angles": "by_head", "has_tail": has_tail}
    check(Layer([17, 0, 5], [3, 0, 5], [0, 0, 2], **shape), dtype, device)


@pytest.mark.gpu
@cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_equals_the_reference_on_a_gpu(options, dtype):
    shape = {"dim": 256, "num_heads": 4, "qk_dim": 64, "v_dim": 64}
    lengths, tails, candidates = [300, 0, 517, 64, 1], [40, 0, 517, 5, 0], [20, 0, 100, 5, 0]
    structure = options["structure"]
    context = 3 if "context" in structure else 0
    if context:
        lengths[-1] = context
    if "candidates" not in structure:
        candidates = [0] * 5
    options = {name: value for name, value in options.items() if name != "structure"}
    check(Layer(lengths, tails, candidates, context, **shape, **options), dtype, "cuda", "auto")


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("activate", "has_tail", "dtype", "angles"),
    [
        ("all", True, torch.float16, "shared"),
        ("u_only", False, torch.float32, "by_head"),
        pytest.param("u_only", True, torch.float16, "none", marks=pytest.mark.slow),
        pytest.param("all", False, torch.float32, "shared", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_what_is_recomputed_has_the_same_bits(activate, has_tail, dtype, angles, device):
    options = {"activate": activate, "has_tail": has_tail, "dropout": 0.3, "concat_ua": True}
    options["angles"] = angles
    layer = Layer([17, 5], [3, 5], [2, 0], bias="position", num_heads=1, **options)
    found = [
        layer.run(dtype, device, impl="triton", recompute=recompute)
        for recompute in ((), ("uvqk",), ("silu",), RECOMPUTED, RECOMPUTABLE)
    ]
    for other in found[1:]:
        for name, expected in found[0].items():
            assert torch.equal(other[name], expected), name


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize(
    ("activate", "angles"), [("all", "none"), ("u_only", "none"), ("all", "shared")]
)
def test_what_is_recomputed_has_the_same_bits_in_bfloat16(activate, angles, impl):
    shape = {"dim": 256, "num_heads": 4, "qk_dim": 64, "v_dim": 64, "angles": angles}
    layer = Layer([700, 131], [3, 5], [2, 0], activate=activate, dropout=0.2, **shape)
    run = partial(layer.run, torch.bfloat16, "cuda", impl=impl, deterministic=True)
    kept = run(recompute=())
    for recompute in (("silu",), RECOMPUTABLE):
        again = run(recompute=recompute)
        for name, expected in kept.items():
            assert torch.equal(again[name], expected), (recompute, name)


def saved_bytes(layer, dtype, **options):
    """Return the bytes that one call keeps for its backward pass, without parameters."""
    inputs = {name: x.to(DEVICE, dtype).requires_grad_() for name, x in layer.tensors.items()}
    parameters = {x.data_ptr() for name, x in inputs.items() if name != "x"}
    storages = {}

    def pack(x):
        if x.is_floating_point() and x.numel() and x.data_ptr() not in parameters:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        layer.call(inputs, DEVICE, impl="triton", **options)
    return sum(storages.values())


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("recompute", "multiple"),
    [
        ((), 24),
        (("silu",), 16),
        (("silu", "gated"), 14),
        (("normed", "gated"), 20),
        (("uvqk",), 8),
        (RECOMPUTED, 4),
        (RECOMPUTABLE, 2),
    ],
    ids=str,
)
def test_bytes_that_are_kept(recompute, multiple):
    """So many times d a token in 16 bits, K H = V H = d, and mean and 1 / std of both norms."""
    L, d = 20, 32
    layer = Layer([13, 7], [0, 0], [0, 0], dim=d, num_heads=2, qk_dim=16, v_dim=16)
    statistics = 2 * 2 * 4
    kept = saved_bytes(layer, torch.float16, recompute=recompute)
    assert kept == L * (multiple * d + statistics)
    # 16 of 4.5 d - 4 d: what the target of 4.5 d leaves to statistics at the smallest d in use.
    assert statistics <= 0.5 * 64


@pytest.mark.interpret
def test_nothing_is_kept_without_gradients(device):
    layer = Layer([5], [5], [0])
    inputs = {name: x.to(device, torch.float32) for name, x in layer.tensors.items()}
    with torch.no_grad():
        y = layer.call(inputs, device, impl="triton", recompute=())
    assert not y.requires_grad
    assert torch.equal(y, layer.run(torch.float32, device, impl="triton")["y"])


@pytest.mark.interpret
def test_dropout_is_a_function_of_the_seed(device):
    layer = Layer([9, 4], [2, 1], [0, 0], dropout=0.5)
    run = partial(layer.run, torch.float32, device, impl="triton", gradients=False)
    first, same = run()["y"], run()["y"]
    other = run(seed=torch.tensor([5], device=device))["y"]
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.interpret
@pytest.mark.parametrize("has_tail", [False, True])
def test_a_nan_stays_in_its_sequence(has_tail, device):
    layer = Layer([18, 17, 3], [18, 17, 3], [0, 0, 0], has_tail=has_tail)
    layer.check_that_a_nan_stays_in_its_sequence(torch.float32, device)


@pytest.mark.interpret
@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=str)
@pytest.mark.parametrize("has_tail", [False, True])
def test_an_empty_batch_has_gradients_of_zero(has_tail, lengths, device):
    layer = Layer(lengths, lengths, lengths, has_tail=has_tail, bias="position_time")
    found = layer.run(torch.float32, device, impl="triton")
    assert found.pop("y").shape == (0, layer.dim)
    assert found.pop("x").shape == (0, layer.dim)
    assert all((gradient == 0).all() for gradient in found.values())


@pytest.mark.interpret
@pytest.mark.parametrize(("has_tail", "recompute"), [(False, ()), (True, RECOMPUTABLE)], ids=str)
def test_registration(has_tail, recompute, device):
    """Schema, fake tensors, autograd and compilation agree."""
    options = {"bias": "position_time", "attention": "softmax", "has_tail": has_tail}
    options["angles"] = "shared" if has_tail else "none"
    layer = Layer([4, 2], [2, 2], [1, 0], num_heads=1, dropout=0.3, concat_ua=True, **options)
    inputs = {
        name: x.to(device, torch.float32).requires_grad_() for name, x in layer.tensors.items()
    }
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kernels.hstu_layer.op.apply", calls.append)
        layer.call(inputs, device, impl="triton", recompute=recompute)
    (call,) = calls
    torch.library.opcheck(torch.ops.gr.hstu_layer.default, call.flat)


@pytest.mark.interpret
@pytest.mark.parametrize("has_tail", [False, True])
def test_compiles_whole(has_tail, device):
    options = {"bias": "position_time", "angles": "none" if has_tail else "shared"}
    layer = Layer([6, 3], [2, 3], [1, 0], num_heads=1, has_tail=has_tail, **options)
    inputs = {name: x.to(device, torch.float32) for name, x in layer.tensors.items()}
    call = partial(layer.call, device=device, impl="triton")
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(inputs), call(inputs))


def small(**changes):
    tensors = Layer([3, 2], [1, 2], [0, 0]).tensors
    weights = LayerWeights(**{name: x.float() for name, x in tensors.items() if name != "x"})
    arguments = {
        "x_LD": tensors["x"].float(),
        "weights": weights,
        "offsets": torch.tensor([0, 3, 5]),
        "num_heads": 2,
        "qk_dim": 16,
        "v_dim": 16,
        "max_len": 3,
        "alpha": 0.25,
        "scaling_length": 5,
    }
    return arguments | changes


def with_weight(**changes):
    return {"weights": replace(small()["weights"], **changes)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_LD": torch.zeros(5, 24, dtype=torch.int64)}, "x must be"),
        ({"x_LD": torch.zeros(5, 0)}, "x must be"),
        ({"num_heads": 0}, "num_heads must be at least 1"),
        ({"qk_dim": 8}, r"weights\.uvqk must be \(24, 96\)"),
        ({"concat_ua": True}, r"weights\.output must be \(24, 96\)"),
        (with_weight(uvqk_bias=torch.zeros(3)), r"weights\.uvqk_bias must be \(128,\)"),
        (with_weight(input_norm=torch.zeros(24, dtype=torch.int64)), r"weights\.input_norm must"),
        ({"offsets": torch.tensor([0, 3, 4])}, "offsets must begin with 0 and end with"),
        ({"offsets": torch.tensor([0, 3, 5], dtype=torch.int32)}, "offsets must be"),
        ({"max_len": 2}, "max_len must be at least"),
        ({"num_candidates": torch.tensor([4, 0])}, "num_candidates must give"),
        ({"num_candidates": torch.tensor([1])}, r"num_candidates must be \(2,\)"),
        ({"scaling_length": None}, "scaling_length must be above 0"),
        ({"attention": "softmax"}, "scaling_length must be None"),
        ({"activate": "none"}, "activate must be one of"),
        ({"norm": "batch"}, "norm must be one of"),
        ({"recompute": ("uvkq",)}, "recompute must hold names"),
        ({"recompute": "uvqk"}, "recompute must hold names"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"dropout": 0.1}, "dropout needs a seed"),
        ({"dropout": 0.1, "seed": torch.tensor(1.0)}, "dropout needs a seed"),
        ({"tail_R": torch.tensor([2])}, "tail_R needs tail_offsets"),
        ({"tail_offsets": torch.tensor([0, 1, 1])}, "would be ignored: tail_R is None"),
        (
            {
                "tail_R": torch.tensor([2]),
                "tail_offsets": torch.tensor([0, 1, 2]),
                "max_tail_len": 1,
            },
            "q_offsets must begin with 0 and end with",
        ),
        ({"impl": "torch"}, "impl must be one of"),
        ({"impl": "hopper"}, "impl='hopper' cannot run"),
    ],
    ids=str,
)
def test_wrong_input_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        hstu_layer(**small(**changes))


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": torch.float64}, "must be float32, float16 or bfloat16"),
        ({"qk_dim": 257}, "qk_dim up to 256"),
        ({"v_dim": 300}, "v_dim up to 256"),
        ({"qk_dim": 15, "angles": "shared"}, r"rotation\.cos must|heads of an even dim"),
    ],
    ids=str,
)
def test_what_the_kernels_cannot_take_is_refused(changes, message, device):
    dtype = changes.pop("dtype", torch.float32) if "dtype" in changes else torch.float32
    layer = Layer([2], [1], [0], num_heads=1, **{k: v for k, v in changes.items() if k != "dtype"})
    with pytest.raises(ValueError, match=message):
        layer.run(dtype, device, impl="triton")


def test_the_mask_is_the_callers():
    layer = Layer([9], [9], [0])
    run = partial(layer.run, torch.float64, "cpu", impl="reference", gradients=False)
    assert not torch.equal(run()["y"], run(mask=AttentionMask(local_window=2))["y"])


@pytest.mark.interpret
@pytest.mark.parametrize("in_fp8", [False, True])
def test_sums_of_dq_are_multiplied_where_they_are_read(in_fp8, device):
    """By a power of two, so that it makes no difference to the bits when."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(13, 96, generator=generator).to(device, torch.float16)
    dq = torch.randn(13, 32, generator=generator).to(device)
    others = {"v": torch.ones_like(z[:, :32]), "k": torch.ones_like(z[:, :32])}

    def run(dq, factor):
        parts = {"v": others["v"], "q": dq, "k": others["k"]}
        dz = torch.empty_like(z)
        options = {"has_silu": True, "has_bias": True}
        if in_fp8:
            rows, sums = silu_bwd_fp8(parts, z, dz, keep=True, q_factor=factor, **options)
            return dz, rows.values.float(), sums
        sums = silu_bwd([*parts.values()], z, dz, factors=[1.0, factor, 1.0], **options)
        return dz, sums

    for found, expected in zip(run(dq, 0.25), run(dq * 0.25, 1.0), strict=True):
        assert torch.equal(found, expected)
    assert not torch.equal(run(dq, 0.25)[0], run(dq, 1.0)[0])
