"""The Triton kernels: under the interpreter on tiny inputs, on a GPU larger ones and bfloat16."""

import math
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from kernels.hstu_attention import AttentionMask, RelativeBias, hstu_attention
from kernels.hstu_attention._triton.align import aligned, narrowed
from tests.checks import assert_within_reference_error
from tests.kernels.hstu_attention_oracle import Case, offsets_of

# Pairs of compile-time options; each mask stands with and without bias, candidates and tails.
COMBINATIONS = {
    "causal": {},
    "causal_softmax": {"activation": "softmax", "qk_dim": 32, "v_dim": 48},
    "context": {"mask": AttentionMask(num_context=3), "bias": "position_time", "qk_dim": 64},
    "prefix": {
        "mask": AttentionMask(num_context=21, context="prefix"),
        "bias": "position",
        "v_dim": 64,
    },
    "prefix_window": {
        "mask": AttentionMask(num_context=5, context="prefix", local_window=9, global_rows=3),
        "activation": "softmax",
    },
    "sees_all": {
        "mask": AttentionMask(num_context=18, context="prefix_sees_all"),
        "bias": "position_time",
        "activation": "softmax",
    },
    "sees_all_window": {
        "mask": AttentionMask(num_context=4, context="prefix_sees_all", local_window=6),
        "bias": "position",
    },
    "window": {"mask": AttentionMask(local_window=10), "bias": "position_time"},
    "window_zero": {"mask": AttentionMask(local_window=0)},
    "global_rows": {"mask": AttentionMask(local_window=8, global_rows=18), "bias": "position"},
    "global_columns": {
        "mask": AttentionMask(num_context=2, local_window=5, global_columns=15),
        "bias": "position_time",
    },
    "everything": {
        "mask": AttentionMask(
            num_context=2, context="prefix", local_window=12, global_rows=5, global_columns=20
        ),
        "bias": "position_time",
        "activation": "softmax",
        "qk_dim": 48,
    },
}
combinations = pytest.mark.parametrize("options", COMBINATIONS.values(), ids=COMBINATIONS.keys())


@contextmanager
def poisoned_memory():
    """Fill what torch.empty returns with NaN, so that an element left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check(case, dtype, device, impl="triton", **options):
    with poisoned_memory():
        got = case.run(impl, dtype, device, **options)
    low = case.run("reference", dtype, device)
    high = case.run("reference", torch.float64, device, rounded_to=dtype)
    scales = case.table_scales() if case.bias != "none" else {}
    # Softmax gradients read weights made anew as exp(score - lse): lse is a rounded number of the
    # size of the largest score, where the reference divides by the sum itself.
    times = 5.0 if case.activation == "softmax" else 2.0
    for name, expected in high.items():
        if expected.numel():
            assert_within_reference_error(
                got[name],
                low[name],
                expected,
                times=2.0 if name == "out" else times,
                scale=scales.get(name),
            )


@pytest.mark.interpret
@combinations
def test_tiny(options, device):
    lengths, candidates, tails = [50, 0, 16], [4, 0, 16], [35, 0, 16]
    if device == "cuda":  # the interpreter takes seconds of more
        lengths, candidates, tails = [67, 0, 16, 36], [4, 0, 16, 1], [45, 0, 16, 36]
    options = {"heads": 1, "qk_dim": 16, "v_dim": 16, "candidates": candidates, **options}
    check(Case(lengths, tails, **options), torch.float32, device)


@pytest.mark.interpret
@settings(max_examples=5, deadline=None)
@given(lengths=st.lists(st.sampled_from([0, 1, 15, 17, 32, 33]), max_size=2))
def test_tiny_lengths_in_half_precision(lengths):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check(Case(lengths, heads=1, qk_dim=16, v_dim=16), torch.float16, device)


@pytest.mark.interpret
@pytest.mark.parametrize("activation", ["silu", "softmax"])
@pytest.mark.parametrize("dims", [(20, 16), (16, 12), (24, 8)], ids=str)
def test_rows_in_half_precision_of_any_length(dims, activation, device):
    case = Case([40, 0, 18], [40, 0, 3], qk_dim=dims[0], v_dim=dims[1], activation=activation)
    check(case, torch.float16, device)


@pytest.mark.interpret
def test_only_rows_that_start_anywhere_are_copied():
    fits = torch.randn(5, 4, 32).half()
    assert aligned(fits) is fits
    assert aligned(fits[:, :, :16]).data_ptr() == fits.data_ptr()
    assert aligned(fits[:, :, :20].float()).shape == (5, 4, 20)
    for x in (fits[:, :, :20], fits[:, :, 1:17], torch.randn(5, 4, 40).half()[:, :, :32]):
        copy = aligned(x)
        assert copy.shape[2] % 16 == 0
        assert copy.is_contiguous()
        assert torch.equal(copy[:, :, : x.shape[2]], x)
        assert not copy[:, :, x.shape[2] :].any()
        assert torch.equal(narrowed(copy, x.shape[2]), x)


@pytest.mark.interpret
@pytest.mark.parametrize("softmax", [False, True], ids=["silu", "softmax"])
def test_registration(softmax, device):
    """Schema, fake tensors, autograd and compilation agree."""
    case = Case([4], bias="position_time", candidates=[1], heads=1)
    x = case.inputs(torch.float32, rounded_to=torch.float32, device=device)
    offsets, candidates = offsets_of([4], device), torch.tensor([1], device=device)
    tables, times = (None, None), (None, None)
    if not softmax:
        tables = x["position_table"], x["time_table"]
        times = case.query_time.to(device), case.key_time.to(device)
    structure = (
        *(offsets, offsets, candidates, *tables, *times),
        *(4, 4, 0.5, 0.25, softmax, 0, "causal", None, 0, 0),
    )
    torch.library.opcheck(torch.ops.gr.hstu_attention.default, (x["q"], x["k"], x["v"], *structure))


@pytest.mark.interpret
def test_strided_views_of_one_buffer(device):
    case = Case([20, 13], qk_dim=16, v_dim=16)
    packed = torch.cat([case.tensors[n].flatten(1) for n in ("v", "q", "k")], dim=1)
    packed = packed.to(device, torch.float32)
    v, q, k = (x.unflatten(1, (2, 16)) for x in packed.requires_grad_().split(32, dim=1))
    assert not q.is_contiguous()
    out = hstu_attention(
        *(q, k, v, offsets_of([20, 13], device)),
        max_len=20,
        alpha=case.alpha,
        scaling_length=case.scaling,
        impl="triton",
    )
    (grad,) = torch.autograd.grad(out, packed, case.grad.to(device, torch.float32))
    low, high = case.run("reference", torch.float32), case.run("reference", torch.float64)
    assert_within_reference_error(out.cpu(), low["out"], high["out"])
    for name, view in zip(("v", "q", "k"), grad.split(32, dim=1), strict=True):
        assert_within_reference_error(view.cpu().unflatten(1, (2, 16)), low[name], high[name])


@pytest.mark.interpret
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_value_stays_in_its_sequence(bad, device):
    case = Case([18, 4, 20], bias="position_time", heads=1, qk_dim=16, v_dim=16)
    for name in ("q", "k", "v"):
        case.tensors[name][18:22] = bad
    case.grad[18:22] = bad
    got = case.run("triton", torch.float32, device)
    for name in ("out", "q", "k", "v"):
        assert got[name][:18].isfinite().all(), name
        assert got[name][22:].isfinite().all(), name


@pytest.mark.interpret
def test_what_the_kernels_do_not_take_is_named(device):
    q = torch.zeros(2, 1, 300, device=device)
    arguments = {"max_len": 2, "alpha": 1.0, "scaling_length": 1, "impl": "triton"}
    with pytest.raises(ValueError, match="dim of 1 to 256, got 300 of q and k"):
        hstu_attention(q, q, q, offsets_of([2], device), **arguments)
    q = q[..., :8].double()
    with pytest.raises(ValueError, match=r"take float32, float16 and bfloat16, got torch\.float64"):
        hstu_attention(q, q, q, offsets_of([2], device), **arguments)


@pytest.mark.gpu
@combinations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_combinations(options, dtype):
    lengths = [300, 1, 0, 129, 128, 64]
    candidates, tails = [20, 1, 0, 0, 128, 3], [300, 1, 0, 70, 128, 5]
    mask = options.get("mask", AttentionMask())
    options = {"qk_dim": 32, "v_dim": 32, "candidates": candidates, **options, "mask": mask}
    check(Case(lengths, tails, position_reach=200, **options), dtype, "cuda")


@pytest.mark.gpu
@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(
        st.sampled_from([0, 1, 2, 63, 64, 65, 127, 128, 129, 200]) | st.integers(0, 400), max_size=6
    ),
    seed=st.integers(0, 2**16),
)
def test_lengths(lengths, seed):
    check(Case(lengths, qk_dim=64, v_dim=64, seed=seed), torch.bfloat16, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dims", [(32, 256), (128, 128), (256, 256), (100, 200)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_dims(dims, dtype):
    case = Case([200, 65], qk_dim=dims[0], v_dim=dims[1], candidates=[5, 0], bias="position_time")
    check(case, dtype, "cuda")


@pytest.mark.gpu
def test_200_runs_give_the_same_bits():
    case = Case([500, 30, 200], candidates=[9, 0, 3], bias="position_time", qk_dim=64, v_dim=64)
    first = case.run("triton", torch.bfloat16, "cuda")
    for _ in range(200):
        again = case.run("triton", torch.bfloat16, "cuda")
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.gpu
def test_a_long_sequence():
    """The last rows of 64k tokens against the reference on those rows."""
    case = Case([65536], heads=1, qk_dim=64, v_dim=64)
    full = case.run("triton", torch.bfloat16, "cuda")["out"][-16:]
    tail = Case([65536], [16], heads=1, qk_dim=64, v_dim=64)
    tail.tensors = {**case.tensors, "q": case.tensors["q"][-16:]}
    low = tail.run("reference", torch.bfloat16, "cuda")["out"]
    high = tail.run("reference", torch.float64, "cuda", rounded_to=torch.bfloat16)["out"]
    assert_within_reference_error(full, low, high)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.xdist_group("large")
def test_more_than_2_31_elements():
    """The last sequence of 2.4e9 elements gives what it gives alone."""
    length, count, heads, dim = 512, 4600, 8, 128
    torch.manual_seed(0)
    q, k, v, dout = (
        torch.randn(length * count, heads, dim, device="cuda", dtype=torch.bfloat16)
        for _ in range(4)
    )
    assert q.numel() > 2**31

    def run(rows, lengths):
        x = [t[rows].detach().requires_grad_() for t in (q, k, v)]
        offsets = offsets_of(lengths, "cuda")
        options = {"max_len": length, "alpha": 0.1, "scaling_length": length, "impl": "triton"}
        out = hstu_attention(*x, offsets, **options)
        return (out.detach(), *torch.autograd.grad(out, x, dout[rows]))

    last = slice(-length, None)
    everything = run(slice(None), [length] * count)
    for together, alone in zip(everything, run(last, [length]), strict=True):
        assert torch.equal(together[last], alone)


@pytest.mark.interpret
def test_compiles_without_a_graph_break(device):
    case = Case([17, 3], bias="position_time", heads=1)
    x = case.inputs(torch.float32, rounded_to=torch.float32, device=device)

    def attend(q, k, v, position_table, time_table, offsets, query_time, key_time):
        bias = RelativeBias(position_table, time_table, query_time, key_time)
        out = hstu_attention(
            *(q, k, v, offsets),
            max_len=17,
            alpha=0.2,
            scaling_length=17,
            mask=AttentionMask(local_window=8),
            bias=bias,
            impl="triton",
        )
        return out * 2

    times = case.query_time.to(device), case.key_time.to(device)
    rest = (offsets_of([17, 3], device), *times)
    compiled = torch.compile(
        attend, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager"
    )
    outs = [f(*x.values(), *rest) for f in (attend, compiled)]
    torch.testing.assert_close(*outs)
    grads = (torch.autograd.grad(out.sum(), list(x.values())) for out in outs)
    for eager, graph in zip(*grads, strict=True):
        torch.testing.assert_close(eager, graph)
