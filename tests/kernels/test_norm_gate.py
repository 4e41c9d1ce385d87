from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.norm_gate import norm_gate, norm_gate_backward, norm_gate_fp8
from kernels.norm_gate.reference import kept
from tests.checks import assert_within_reference_error
from tests.kernels.evaluate import double, outputs_and_gradients, poisoned_memory
from tests.kernels.fp8 import FP8_CHECKS, assert_rounded, assert_within_a_step

EPS = 1e-6
IMPLS = ["reference", pytest.param("triton", marks=pytest.mark.interpret)]
OPTIONS = [
    {},
    {"num_groups": 4},
    {"concat": True},
    {"dropout": 0.3},
    {"num_groups": 2, "concat": True, "dropout": 0.5},
]


def mix(x):
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def keep_one(seed, row, column, dropout):
    """What dropout keeps, in Python integers."""
    seed %= 2**64
    key = mix(mix((seed + row * 0x9E3779B9) % 2**32) ^ (seed >> 32))
    return mix(key ^ (column * 0x85EBCA6B % 2**32)) >> 8 >= round(dropout * 2**24)


def oracle(x, u, weight, bias, seed=None, *, num_groups=1, concat=False, dropout=0.0):
    """The gated norm row by row in float64, from its formula."""
    rows = []
    for i in range(x.shape[0]):
        groups = [
            (g - g.sum() / g.numel()) / (g.var(correction=0) + EPS).sqrt()
            for g in x[i].chunk(num_groups)
        ]
        n = torch.cat(groups)
        n = n if weight is None else n * weight
        n = n if bias is None else n + bias
        row = torch.cat([u[i], x[i], n * u[i]]) if concat else n * u[i]
        if dropout:
            keep = [keep_one(int(seed), i, j, dropout) for j in range(row.numel())]
            row = row * torch.tensor(keep, device=x.device) / (1 - dropout)
        rows.append(row)
    return (
        torch.stack(rows) if rows else x.new_zeros(0, x.shape[1] * (3 if concat else 1)) + x.sum()
    )


def make(L, C, dtype, device, affine=(True, True), concat=False, seed=0):
    generator = torch.Generator(device).manual_seed(seed)
    draw = partial(torch.randn, generator=generator, device=device)
    x, u = (draw(L, C) + 1).to(dtype), draw(L, C).to(dtype)
    weight = draw(C).to(dtype) if affine[0] else None
    bias = draw(C).to(dtype) if affine[1] else None
    dout = draw(L, 3 * C if concat else C).to(dtype)
    return (x, u, weight, bias), dout, torch.tensor(2**61 + 12345 + seed, device=device)


def check(inputs, dout, seed, options, impl):
    run = partial(norm_gate, seed=seed, eps=EPS, **options)
    got = outputs_and_gradients(partial(run, impl=impl), inputs, dout)
    low = outputs_and_gradients(partial(run, impl="reference"), inputs, dout)
    high = outputs_and_gradients(partial(run, impl="reference"), double(inputs), dout.double())
    for i, (actual, same, exact) in enumerate(zip(got, low, high, strict=True)):
        assert actual.dtype == same.dtype
        if actual.numel():
            scale = scale_of_dx(inputs, dout, options) if i == 1 else None
            # Of a single row, dweight is a product of five rounded factors.
            times = 5.0 if i > 2 else 2.0
            assert_within_reference_error(actual, same, exact, scale=scale, times=times)


def scale_of_dx(inputs, dout, options):
    """The terms of dx = rstd (g - mean(g) - ...) cancel: in a group of one channel, to zero."""
    x, u, weight, _ = double(inputs)
    L, C = x.shape
    g = (
        dout.double()[:, -C:]
        * u
        * (1 if weight is None else weight)
        / (1 - options.get("dropout", 0))
    )
    groups = x.reshape(L, options.get("num_groups", 1), -1)
    rstd = (groups.var(2, correction=0) + EPS).rsqrt()
    return max(g.abs().max() * rstd.max(), dout.abs().max()).item()


@pytest.mark.parametrize("affine", [(True, True), (False, False), (True, False)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(1, 4), (7, 36), (0, 8)], ids=str)
def test_reference_is_its_formula(shape, options, affine, device):
    inputs, dout, seed = make(
        *shape, torch.float32, device, affine, concat=options.get("concat", False)
    )
    run = partial(norm_gate, seed=seed, eps=EPS, impl="reference", **options)
    got = outputs_and_gradients(run, double(inputs), dout.double())
    rows = partial(oracle, seed=seed, **options)
    if shape[0] == 0:
        assert got[0].shape == dout.shape
        assert all((gradient == 0).all() for gradient in got[1:])
        return
    for actual, exact in zip(
        got, outputs_and_gradients(rows, double(inputs), dout.double()), strict=True
    ):
        torch.testing.assert_close(actual, exact, rtol=1e-10, atol=1e-10)


def test_dropout_keeps_independently():
    p, rows, columns = 0.3, 500, 400
    first = kept(torch.tensor(7), rows, columns, p)
    other = kept(torch.tensor(7 + 2**40), rows, columns, p)
    n = rows * columns
    # Counts of independent draws lie within 5 standard deviations.
    slack = 5 * (p * (1 - p) * n) ** 0.5
    assert abs((~first).sum() - p * n) < slack
    assert abs((~other).sum() - p * n) < slack
    pairs = {
        "seed": (first, other),
        "row": (first[1:], first[:-1]),
        "column": (first[:, 1:], first[:, :-1]),
        "diagonal": (first[1:, 1:], first[:-1, :-1]),
    }
    for name, (a, b) in pairs.items():
        both = (~a & ~b).sum() / a.numel()
        assert abs(both - p * p) < 5 * (p * p / a.numel()) ** 0.5, name
    for dim, size in ((0, rows), (1, columns)):
        shares = (~first).float().mean(dim)
        assert (shares - p).abs().max() < 6 * (p * (1 - p) / size) ** 0.5


@pytest.mark.interpret
@pytest.mark.parametrize("affine", [(True, True), (False, False), (False, True)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(1, 4), (0, 8), (37, 36)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_triton_within_error_budget(shape, dtype, options, affine, device):
    inputs, dout, seed = make(*shape, dtype, device, affine, concat=options.get("concat", False))
    check(inputs, dout, seed, options, "triton")


@pytest.mark.interpret
@settings(deadline=None, max_examples=15)
@given(
    L=st.integers(0, 40),
    V=st.integers(16, 60),
    options=st.sampled_from(OPTIONS),
    seed=st.integers(0, 9),
)
def test_triton_any_shape(L, V, options, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    C = V * options.get("num_groups", 1)
    inputs, dout, drawn = make(
        L, C, torch.float32, device, concat=options.get("concat", False), seed=seed
    )
    check(inputs, dout, drawn, options, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("C", [256, 512, 1024, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_large_within_error_budget(C, dtype, options):
    inputs, dout, seed = make(4099, C, dtype, "cuda", concat=options.get("concat", False))
    check(inputs, dout, seed, options, "triton")


@pytest.mark.interpret
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_views_of_a_wider_buffer(options, device):
    concat = options.get("concat", False)
    (wide, wide_u, weight, bias), dout, seed = make(9, 192, torch.float32, device, concat=concat)
    wider_u = torch.cat([wide_u, wide_u], 1)
    inputs = (wide[:, 64:128], wider_u[:, 48:112], weight[:64], bias[:64])
    check(inputs, dout[:, : 192 if concat else 64], seed, options, "triton")


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, in the interpreter
def test_nan_stays_in_its_row(device):
    inputs, dout, seed = make(20, 48, torch.float32, device, concat=True)
    run = partial(norm_gate, num_groups=2, concat=True, dropout=0.2, seed=seed, impl="triton")
    clean = outputs_and_gradients(run, inputs, dout)
    x, u = inputs[0].clone(), inputs[1].clone()
    x[5, 3], u[11, 0] = torch.nan, torch.inf
    found = outputs_and_gradients(run, (x, u, *inputs[2:]), dout)
    others = [i for i in range(20) if i not in (5, 11)]
    for actual, expected in zip(found[:3], clean[:3], strict=True):
        assert torch.equal(actual[others], expected[others])


def check_fp8(inputs, options, impl):
    with poisoned_memory(inputs[0].device):
        found = norm_gate_fp8(*inputs, eps=EPS, keep=True, impl=impl, **options)
        alone = norm_gate_fp8(*inputs, eps=EPS, impl=impl, **options)
    assert alone.out is None
    assert_within_a_step(found.out, norm_gate(*inputs, eps=EPS, impl=impl, **options))
    if inputs[0].shape[0]:
        exact = norm_gate(*double(inputs), eps=EPS, impl="reference", **options)
        for rows in (found.rows, alone.rows):
            assert_rounded(rows, exact, error=1e-5 * (1 + exact.abs().max()))
    return found


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("affine", [(True, True), (False, False)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(0, 8), (37, 36)], ids=str)
def test_fp8_is_the_output_rounded_once(shape, dropout, affine, impl, device):
    inputs, dout, seed = make(*shape, torch.float16, device, affine)
    seed = seed if dropout else None
    found = check_fp8(inputs, {"dropout": dropout, "seed": seed}, impl)
    if impl == "triton":
        parts = (seed, found.mean, found.rstd)
        gradients = norm_gate_backward(dout, *inputs, *parts, dropout=dropout)
        run = partial(norm_gate, eps=EPS, dropout=dropout, seed=seed, impl="triton")
        expected = outputs_and_gradients(run, inputs, dout)[1:]
        wanted = [g for g, t in zip(gradients, inputs, strict=True) if t is not None]
        for actual, same in zip(wanted, expected, strict=True):
            assert_within_a_step(actual.to(same.dtype), same)


@pytest.mark.gpu
@pytest.mark.parametrize("C", [256, 1000, 2048])
def test_fp8_large(C):
    check_fp8(make(4099, C, torch.bfloat16, "cuda")[0], {}, "triton")


@pytest.mark.interpret
def test_registration(device):
    (x, u, weight, bias), _, seed = make(6, 20, torch.float32, device)
    for vectors in ((weight, bias, seed), (None, None, None)):
        tensors = [x, u, *vectors]
        leaves = [
            t.clone().requires_grad_() if t is not None and t.is_floating_point() else t
            for t in tensors
        ]
        dropout = 0.0 if vectors[2] is None else 0.2
        torch.library.opcheck(torch.ops.gr.norm_gate.default, (*leaves, 2, EPS, True, dropout))
        arguments = (x, u, *vectors, EPS, dropout, dropout == 0)
        torch.library.opcheck(torch.ops.gr.norm_gate_fp8.default, arguments, test_utils=FP8_CHECKS)


@pytest.mark.gpu
def test_compiles_without_graph_break():
    (x, u, weight, bias), _, seed = make(6, 20, torch.float32, "cuda")
    run = partial(norm_gate, seed=seed, dropout=0.2)
    compiled = torch.compile(run, fullgraph=True)(x, u, weight, bias)
    torch.testing.assert_close(compiled, run(x, u, weight, bias))


@pytest.mark.gpu
@pytest.mark.xdist_group("large")
def test_more_than_int32_elements():
    L, C = 2**31 // 1024 + 8, 1024
    x = torch.empty(L, C, device="cuda", dtype=torch.bfloat16)
    x[-8:] = torch.randn(8, C, device="cuda")
    y = norm_gate(x, x)
    torch.testing.assert_close(y[-8:], norm_gate(x[-8:], x[-8:]), rtol=0, atol=0)


ONES = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.ones(3), torch.ones(3)), {}, r"x must be \(L, C\)"),
        ((ONES, torch.ones(3, 2)), {}, "u must be as x"),
        ((ONES, ONES.double()), {}, "u must be as x"),
        ((ONES, ONES, torch.ones(3)), {}, r"weight must be \(4,\)"),
        ((ONES, ONES, None, torch.ones(4, dtype=torch.long)), {}, r"bias must be \(4,\)"),
        ((ONES, ONES), {"num_groups": 3}, "num_groups must divide the 4"),
        ((ONES, ONES), {"num_groups": 0}, "num_groups must divide the 4"),
        ((ONES, ONES), {"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ((ONES, ONES), {"dropout": 0.1}, "dropout needs a seed"),
        ((ONES, ONES), {"dropout": 0.1, "seed": torch.ones(1)}, "dropout needs a seed"),
    ],
)
def test_wrong_input(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        norm_gate(*arguments, **options)


@pytest.mark.interpret
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_backward_from_what_silu_read(options, device):
    """With u = silu(z): the gradient of z in place of z, its sum, and the output once more."""
    from kernels.norm_gate._triton import norm_gate_fwd, norm_gate_silu_bwd

    inputs, dout, seed = make(9, 40, torch.float32, device, concat=options.get("concat", False))
    x, z, weight, bias = inputs

    def whole(x, z, weight, bias):
        u = torch.nn.functional.silu(z)
        return norm_gate(x, u, weight, bias, seed=seed, eps=EPS, impl="reference", **options)

    high = outputs_and_gradients(whole, double(inputs), dout.double())
    low = outputs_and_gradients(whole, inputs, dout)
    flat = (options.get("num_groups", 1), options.get("concat", False), options.get("dropout", 0.0))
    u = torch.nn.functional.silu(z)
    out, mean, rstd = norm_gate_fwd(x, u, weight, bias, seed, flat[0], EPS, *flat[1:])
    dz, again = z.clone(), torch.full_like(out, float("nan"))
    statistics = (mean, rstd)
    dx, dweight, dbias, dz_sum = norm_gate_silu_bwd(
        dout, x, dz, weight, bias, seed, *statistics, *flat, dz, True, again
    )
    got = (again, dx, dz, dweight, dbias)
    for i, expected in enumerate(high):
        assert_within_reference_error(got[i], low[i], expected, times=2.0)
    assert_within_reference_error(dz_sum, low[2].sum(0), high[2].sum(0))
