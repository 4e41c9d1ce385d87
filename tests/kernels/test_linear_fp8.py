"""Linear map in fp8: every product against float64 of exactly the fp8 values that went in."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.dispatch import is_hopper
from kernels.linear import (
    faster_wgrad,
    linear,
    linear_fp8,
    linear_fp8_dgrad,
    linear_fp8_forward,
    linear_fp8_wgrad,
    quantize_weight,
    silu_backward_fp8,
)
from kernels.quantize import QuantizedRows, quantize_rows, transpose_rows
from tests.kernels.evaluate import outputs_and_gradients, poisoned_memory
from tests.kernels.fp8 import FP8_CHECKS, assert_rounded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_hopper = pytest.mark.skipif(
    not is_hopper(torch.device(DEVICE)), reason="needs a GPU of compute capability 9.0"
)
KINDS = [
    "reference",
    pytest.param("triton", marks=pytest.mark.interpret),
    pytest.param("hopper", marks=[pytest.mark.gpu, needs_hopper]),
]
FORMS = ["plain", "silu", "part_silu", "residual"]


def columns_of(form, F):
    return {"silu": F, "part_silu": (F + 1) // 2}.get(form, 0)


def make(L, D, F, form, seed=0, dtype=torch.float16, spread=1.0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    draw = partial(torch.randn, generator=generator, device=DEVICE)
    # Rows of very different sizes: the scale of each matters.
    x = (draw(L, D) * (spread * draw(L, 1)).exp()).to(dtype)
    weight = (draw(F, D) / D**0.5 * (spread * draw(F, 1)).exp()).to(dtype)
    residual = draw(L, F).to(dtype) if form == "residual" else None
    dout = (draw(L, F) * (spread * draw(L, 1)).exp()).to(dtype)
    return (x, weight, draw(F), residual), dout


def value(rows: QuantizedRows):
    return rows.values.double() * rows.scale.double()[:, None]


def bounded(actual, exact, terms):
    """Whether each sum is right: to one rounding of its dtype, and to float32 of its terms.

    Args:
        actual: what the operator gives.
        exact: in float64.
        terms: the sum of the terms' magnitudes, in float64: what cancels.
    """
    eps = torch.finfo(actual.dtype).eps
    # Sums inside the tensor cores lose up to 2^-13 of the largest at each of their additions.
    allowed = eps * exact.abs() + 4e-3 * terms + 1e-7
    error = (actual.double() - exact).abs()
    assert torch.isfinite(actual).all()
    assert bool((error <= allowed).all()), (error - allowed).max().item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "shape", [(0, 16, 16), (1, 16, 16), (130, 80, 272), (70, 304, 136)], ids=str
)
def test_forward(shape, form, kind):
    check_forward(*shape, form, kind)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "shape",
    [(4099, 512, 2048), (4099, 1024, 1000), (3000, 2048, 512), (70, 1056, 136), (1, 2064, 8)],
    ids=str,
)
def test_forward_large(shape, form):
    check_forward(*shape, form, "hopper", dtype=torch.bfloat16)


def check_forward(L, D, F, form, kind, dtype=torch.float16):
    (x, weight, bias, residual), _ = make(L, D, F, form, dtype=dtype)
    rows, rows_of_weight = quantize_rows(x), quantize_weight(weight).rows
    columns = columns_of(form, F)
    with poisoned_memory(x.device):
        y, z = linear_fp8_forward(
            rows,
            rows_of_weight,
            bias,
            residual,
            silu_columns=columns,
            keep=columns > 0,
            dtype=dtype,
            impl=kind,
        )
    a, b = value(rows), value(rows_of_weight)
    exact = a @ b.T + bias.double()
    terms = a.abs() @ b.abs().T + bias.double().abs()
    if columns:
        bounded(z, exact, terms)
        silu = torch.arange(F, device=x.device) < columns
        exact = torch.where(silu, exact * torch.sigmoid(exact), exact)
    else:
        assert z is None
    if residual is not None:
        exact = exact + residual.double()
        terms = terms + residual.double().abs()
    assert y.dtype == dtype
    bounded(y, exact, terms)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["plain", "silu", "part_silu"])
@pytest.mark.parametrize("shape", [(0, 16), (1, 3), (37, 272), (70, 64), (9, 4112)], ids=str)
def test_silu_backward(shape, form, kind):
    check_silu_backward(*shape, form, kind)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("form", ["plain", "silu"])
@pytest.mark.parametrize("shape", [(4099, 1024), (9000, 2048), (4099, 4096), (2000, 8192)], ids=str)
def test_silu_backward_large(shape, form):
    check_silu_backward(*shape, form, "hopper", dtype=torch.bfloat16)


def check_silu_backward(L, F, form, kind, dtype=torch.float16):
    dy = make(L, 16, F, form, dtype=dtype)[1]
    z = None if form == "plain" else make(L, 16, F, form, seed=1, dtype=dtype)[1]
    columns = columns_of(form, F)
    run = partial(silu_backward_fp8, dy, z, silu_columns=columns, impl=kind)
    with poisoned_memory(dy.device):
        found, turned = run(keep=True), run(transpose=True)
    exact = dy.double()
    if z is not None:
        leaf = z.double().requires_grad_()
        silu = torch.arange(F, device=dy.device) < columns
        y = torch.where(silu, leaf * torch.sigmoid(leaf), leaf)
        (exact,) = torch.autograd.grad(y, leaf, dy.double())
    near = dy.double().abs() * 2**-10  # The error of a fast tanh.
    for result in (found, turned):
        assert_rounded(result.rows, exact, error=near)
        error = (result.dbias.double() - exact.sum(0)).abs()
        assert bool((error <= near.sum(0) + 1e-5 * exact.abs().sum(0) + 1e-7).all())
    error = (found.dz.double() - exact).abs()
    assert bool((error <= exact.abs() * torch.finfo(dtype).eps + near + 1e-7).all())
    assert found.transposed is None
    assert turned.dz is None
    expected = transpose_rows(turned.rows.values, impl="reference")
    assert torch.equal(turned.transposed.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 16, 16), (130, 272, 80), (70, 48, 144)], ids=str)
def test_dgrad(shape, kind):
    check_dgrad(*shape, kind)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("shape", [(4099, 512, 2048), (1000, 1008, 4096), (70, 48, 1040)], ids=str)
def test_dgrad_large(shape):
    check_dgrad(*shape, "hopper")


def check_dgrad(L, D, F, kind):
    (_, weight, _, _), dz = make(L, D, F, "plain")
    rows, columns = quantize_rows(dz), quantize_weight(weight).columns
    with poisoned_memory(dz.device):
        dx = linear_fp8_dgrad(rows, columns, dtype=torch.float16, impl=kind)
        short = linear_fp8_dgrad(rows, columns, dtype=torch.float16, promote=False, impl=kind)
    a, b = value(rows), value(columns)
    assert dx.shape == short.shape == (L, D)
    for found in (dx, short):
        bounded(found, a @ b.T, a.abs() @ b.abs().T)
    torch.testing.assert_close(b.T, weight.double(), rtol=2**-4, atol=weight.abs().max() * 2**-17)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 16, 16), (1, 16, 16), (130, 80, 272), (700, 144, 48)])
def test_wgrad(shape, kind):
    check_wgrad(*shape, kind)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("shape", [(4099, 512, 2048), (131072, 512, 512), (9000, 1000, 136)])
def test_wgrad_large(shape):
    check_wgrad(*shape, "hopper")


def check_wgrad(L, D, F, kind):
    (x, _, _, _), dz = make(L, D, F, "plain")
    rows, rows_of_x = quantize_rows(dz), quantize_rows(x)
    with poisoned_memory(dz.device):
        found = linear_fp8_wgrad(rows, rows_of_x, impl=kind)
    assert found.dtype == torch.float32
    assert found.shape == (F, D)
    if L == 0:
        assert not found.any()
        return
    a, b = value(rows), value(rows_of_x)
    # What folding rounds: steps of 2^-9 at the largest product of scales.
    top = (rows.scale * rows_of_x.scale).double().max()
    step = top * 2**-10 * rows.values.double().abs().sum(0)[:, None]
    error = (found.double() - a.T @ b).abs()
    assert bool((error <= 4e-3 * (a.abs().T @ b.abs()) + step).all())
    assert (error.norm() / (a.T @ b).norm()).item() < 0.01


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("kind", ["triton", "hopper"])
@pytest.mark.parametrize("L", [4096, 131072])
def test_sums_over_tokens_do_not_drift(L, kind):
    # Products of one sign: what the tensor cores cut off adds up.
    generator = torch.Generator(DEVICE).manual_seed(0)
    draw = partial(torch.randn, L, 512, generator=generator, device=DEVICE)
    a, b = (quantize_rows((1 + draw() / 2).bfloat16()) for _ in range(2))
    found = linear_fp8_wgrad(a, b, impl=kind).double()
    exact = value(a).T @ value(b)
    assert ((found - exact).norm() / exact.norm()).item() < 4e-3


@pytest.mark.interpret
@settings(deadline=None, max_examples=5)
@given(
    L=st.integers(0, 140),
    D=st.integers(1, 5),
    F=st.integers(2, 9),
    form=st.sampled_from(FORMS),
    wgrad=st.sampled_from(["fold", "bf16"]),
)
def test_gradients_are_those_of_the_reference(L, D, F, form, wgrad):
    check_gradients(L, 16 * D, 16 * F, form, wgrad, "triton")


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wgrad", ["fold", "bf16"])
@pytest.mark.parametrize("shape", [(0, 16, 16), (300, 64, 272), (4099, 1024, 1024)], ids=str)
def test_hopper_gradients_are_those_of_the_reference(shape, form, wgrad):
    check_gradients(*shape, form, wgrad, "hopper")


def call(x, weight, bias, residual, *, form, wgrad, kind):
    options = {"activation": "silu", "silu_columns": columns_of(form, weight.shape[0])}
    return linear_fp8(
        x,
        weight,
        bias,
        residual_LF=residual,
        wgrad=wgrad,
        impl=kind,
        **(options if "silu" in form else {}),
    )


def check_gradients(L, D, F, form, wgrad, kind):
    inputs, dout = make(L, D, F, form)
    found, expected = (
        outputs_and_gradients(partial(call, form=form, wgrad=wgrad, kind=k), inputs, dout)
        for k in (kind, "reference")
    )
    for actual, same in zip(found, expected, strict=True):
        assert actual.dtype == same.dtype
        assert actual.shape == same.shape
        if actual.numel():
            # z is rounded to 16 bits by both, but to either side: dz may round to the next fp8.
            error = (actual.double() - same.double()).norm()
            assert error <= 2e-2 * same.double().norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wgrad", ["fold", "bf16"])
def test_stays_near_the_linear_map_it_stands_for(wgrad, kind):
    inputs, dout = make(200, 64, 128, "silu", spread=0.1)
    run = partial(call, form="silu", wgrad=wgrad, kind=kind)
    found = outputs_and_gradients(run, inputs, dout)
    run = partial(linear, activation="silu", impl="reference")
    exact = outputs_and_gradients(run, inputs[:3], dout)
    for actual, other in zip(found, exact, strict=True):
        error = (actual.double() - other.double()).norm() / other.double().norm()
        assert error < 0.06, error


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, in the interpreter
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wgrad", ["fold", "bf16"])
def test_broken_row_stays_in_its_row(wgrad, kind):
    inputs, dout = make(140, 48, 64, "silu")
    run = partial(call, form="silu", wgrad=wgrad, kind=kind)
    clean = outputs_and_gradients(run, inputs, dout)
    x = inputs[0].clone()
    x[5, 3], x[70, 0] = torch.nan, torch.inf
    found = outputs_and_gradients(run, (x, *inputs[1:]), dout)
    others = [i for i in range(140) if i not in (5, 70)]
    for i in range(2):
        assert torch.equal(found[i][others], clean[i][others])
        assert found[i][[5, 70]].isnan().all()
    # Every element of dW sums over all tokens.
    assert found[2].isnan().all()
    assert found[3].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_zero_and_tiny_gradients(kind):
    inputs, dout = make(50, 32, 48, "plain")
    run = partial(call, form="plain", wgrad="fold", kind=kind)
    found = outputs_and_gradients(run, inputs, torch.zeros_like(dout))
    assert not any(gradient.any() for gradient in found[1:])
    rows = quantize_rows(dout.float() * 1e-12)
    of_x = quantize_rows(inputs[0])
    small = linear_fp8_wgrad(rows, of_x, impl=kind)
    exact = value(rows).T @ value(of_x)
    assert ((small.double() - exact).norm() / exact.norm()).item() < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_kept_weight_gives_the_same(kind):
    (x, weight, bias, _), _ = make(70, 32, 48, "silu")
    kept = quantize_weight(weight)
    found = linear_fp8(x, weight, bias, activation="silu", quantized=kept, impl=kind)
    assert torch.equal(found, linear_fp8(x, weight, bias, activation="silu", impl=kind))
    master = weight.float().requires_grad_()
    y = linear_fp8(x, master, bias, activation="silu", quantized=kept, impl=kind)
    assert torch.equal(y, found)
    y.sum().backward()
    assert master.grad.dtype == torch.float32


@pytest.mark.interpret
def test_registration():
    (x, weight, bias, residual), dout = make(20, 32, 48, "residual")
    rows, kept = quantize_rows(x), quantize_weight(weight)
    gradients = quantize_rows(dout)
    check = partial(torch.library.opcheck, test_utils=FP8_CHECKS)
    ops = torch.ops.gr
    for columns, keep, added in ((48, True, None), (0, False, residual)):
        arguments = (*rows, *kept.rows, bias, added, columns, keep, torch.float16, False)
        check(ops.linear_fp8.default, arguments)
    scales = (gradients.scale, kept.columns.scale)
    products = (gradients.values, kept.columns.values)
    check(ops.product_fp8.default, (*products, *scales, torch.float16, False))
    check(ops.product_fp8.default, (*products, None, None, torch.float32, False))
    for z, keep in ((dout, True), (None, False)):
        torch.library.opcheck(ops.silu_bwd_fp8.default, (dout, z, 30 if keep else 0, keep))
    if is_hopper(torch.device(DEVICE)):
        check(ops.silu_bwd_fp8_transposed.default, (dout, dout, 30))


@pytest.mark.interpret
def test_traces_without_graph_break():
    inputs, dout = make(64, 32, 48, "silu")
    run = partial(call, form="silu", wgrad="fold", kind="auto")
    traced = torch.compile(run, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(
        outputs_and_gradients(traced, inputs, dout),
        outputs_and_gradients(run, inputs, dout),
        strict=True,
    ):
        assert torch.equal(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("wgrad", ["fold", "bf16"])
def test_compiles_without_graph_break(wgrad):
    inputs, dout = make(64, 32, 48, "silu", dtype=torch.bfloat16)
    run = partial(call, form="silu", wgrad=wgrad, kind="auto")
    compiled = outputs_and_gradients(torch.compile(run, fullgraph=True), inputs, dout)
    for actual, expected in zip(compiled, outputs_and_gradients(run, inputs, dout), strict=True):
        torch.testing.assert_close(actual, expected)


def test_faster_wgrad_is_in_sixteen_bits_elsewhere():
    assert faster_wgrad(8192, 2048, torch.device("cpu"), has_silu=True) == "bf16"


@pytest.mark.gpu
@needs_hopper
def test_faster_wgrad_as_measured():
    device = torch.device(DEVICE)
    for dim, with_silu, without in ((512, "fold", "bf16"), (2048, "fold", "fold")):
        assert faster_wgrad(4 * dim, dim, device, has_silu=True) == with_silu
        assert faster_wgrad(dim, dim, device, has_silu=False) == without


X, W = torch.ones(3, 16).half(), torch.ones(8, 16).half()


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: linear_fp8(X[0], W), r"x must be \(L, D\)"),
        (lambda: linear_fp8(X, W.bfloat16()), "weight must be torch.float16"),
        (lambda: linear_fp8(X, W, wgrad="fp8"), "wgrad must be auto, fold or bf16, got 'fp8'"),
        (lambda: linear_fp8(X, W, quantized=quantize_weight(W.T)), r"of a weight \(8, 16\)"),
        (lambda: linear_fp8(X, W, impl="hopper"), "compute capability 9.0"),
        (lambda: linear_fp8(X[:, :8], W[:, :8], impl="hopper"), "multiples of 16"),
        (
            lambda: linear_fp8_forward(quantize_rows(X), quantize_rows(W[:, :8])),
            "x must have rows of 8",
        ),
        (lambda: linear_fp8_wgrad(quantize_rows(X), quantize_rows(X[:2])), "x must have 3 rows"),
        (
            lambda: linear_fp8_wgrad(*[quantize_rows(X)] * 2, transposed=quantize_rows(X).values),
            r"transposed must be \(16, 32\)",
        ),
        (lambda: silu_backward_fp8(X, None, silu_columns=3), "silu_columns=3 needs z"),
    ],
)
def test_wrong_input(run, message):
    with pytest.raises(ValueError, match=message):
        run()


@pytest.mark.interpret
def test_kernels_store_sixteen_bits():
    x, weight = torch.ones(3, 16, device=DEVICE), torch.ones(8, 16, device=DEVICE)
    with pytest.raises(ValueError, match="store float16 or bfloat16"):
        linear_fp8(x, weight, impl="triton")
    assert linear_fp8(x, weight, impl="reference").dtype == torch.float32
