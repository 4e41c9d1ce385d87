from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.dispatch import is_hopper
from kernels.linear import linear
from tests.checks import assert_within_reference_error
from tests.kernels.evaluate import double, outputs_and_gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_hopper = pytest.mark.skipif(
    not is_hopper(torch.device(DEVICE)), reason="needs a GPU of compute capability 9.0"
)
FORMS = ["plain", "silu", "part_silu", "residual"]


def columns_of(form, F):
    """SiLU on so many first columns."""
    return {"silu": F, "part_silu": (F + 1) // 2}.get(form, 0)


def oracle(x, weight, bias, residual, *, form):
    """The map as explicit sums."""
    z = (x[:, None, :] * weight[None, :, :]).sum(2)
    z = z if bias is None else z + bias
    silu = torch.arange(z.shape[1], device=x.device) < columns_of(form, z.shape[1])
    z = torch.where(silu, z / (1 + torch.exp(-z)), z)
    return z if residual is None else z + residual


def make(L, D, F, dtype, form, has_bias=True, seed=0, device=DEVICE):
    generator = torch.Generator(device).manual_seed(seed)
    draw = partial(torch.randn, generator=generator, device=device)
    x, weight = draw(L, D).to(dtype), (draw(F, D) / D**0.5).to(dtype)
    # With silu the gradient of the bias has the precision of z, so the bias has its dtype.
    bias = draw(F).to(dtype if "silu" in form else torch.float32) if has_bias else None
    residual = draw(L, F).to(dtype) if form == "residual" else None
    return (x, weight, bias, residual), draw(L, F).to(dtype)


def call(x, weight, bias, residual, *, form, impl):
    if form == "part_silu":
        columns = columns_of(form, weight.shape[0])
        return linear(x, weight, bias, activation="silu", silu_columns=columns, impl=impl)
    activation = "silu" if form == "silu" else "none"
    return linear(x, weight, bias, activation=activation, residual_LF=residual, impl=impl)


def check(inputs, dout, form, impl="triton"):
    got, low = (
        outputs_and_gradients(partial(call, form=form, impl=kind), inputs, dout)
        for kind in (impl, "reference")
    )
    run = partial(call, form=form, impl="reference")
    high = outputs_and_gradients(run, double(inputs), dout.double())
    for i, (actual, same, exact) in enumerate(zip(got, low, high, strict=True)):
        assert actual.dtype == same.dtype
        if actual.numel():
            # Gradients with silu: z and dz are kept in 16 bits, the reference keeps float32.
            times = 5.0 if i > 0 and "silu" in form else 2.0
            assert_within_reference_error(actual, same, exact, times=times)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(0, 3, 4), (1, 1, 1), (9, 5, 7)], ids=str)
def test_reference_is_its_formula(shape, has_bias, form):
    inputs, dout = make(*shape, torch.float64, form, has_bias)
    found = outputs_and_gradients(partial(call, form=form, impl="reference"), inputs, dout)
    expected = outputs_and_gradients(partial(oracle, form=form), inputs, dout)
    for actual, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-7, atol=1e-7)


@pytest.mark.interpret
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(0, 8, 16), (1, 1, 1), (130, 72, 264), (257, 64, 16), (65, 33, 70)],
    ids=str,
)
def test_triton_within_error_budget(shape, dtype, form):
    check(*make(*shape, dtype, form), form)


@pytest.mark.interpret
@settings(deadline=None, max_examples=10)
@given(
    L=st.integers(0, 140),
    D=st.integers(8, 70),
    # One column may lie where the derivative of silu is 0: all that is left is z's rounding.
    F=st.integers(16, 140),
    form=st.sampled_from(FORMS),
    has_bias=st.booleans(),
)
def test_triton_any_shape(L, D, F, form, has_bias):
    check(*make(L, D, F, torch.float16, form, has_bias), form)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4099, 512, 2048), (5000, 1024, 200), (1000, 500, 1000)])
def test_large_within_error_budget(shape, dtype, form):
    check(*make(*shape, dtype, form), form)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        # Rows of up to 1024 bytes: a tile a warp group, in turns; one tile, two, many, tails.
        *[(0, 8, 8), (1, 8, 8), (128, 64, 256), (130, 72, 264), (4099, 512, 2048), (900, 8, 136)],
        # Longer rows: both warp groups share a tile.
        *[(1, 520, 264), (64, 1024, 256), (65, 600, 400), (4099, 1024, 1000), (20000, 2048, 512)],
    ],
    ids=str,
)
def test_hopper_within_error_budget(shape, dtype, form):
    check(*make(*shape, dtype, form), form, "hopper")
    check(*make(*shape, dtype, form, has_bias=False), form, "hopper")


@pytest.mark.gpu
@needs_hopper
@settings(deadline=None, max_examples=40)
@given(
    L=st.integers(1, 2000),
    D=st.integers(1, 160),
    F=st.integers(2, 80),
    form=st.sampled_from(FORMS),
    start=st.integers(0, 2),
)
def test_hopper_any_shape_and_view(L, D, F, form, start):
    (x, weight, bias, residual), dout = make(L, 8 * D + 16, 8 * F + 16, torch.bfloat16, form)
    x, weight = x[:, 8 * start :][:, : 8 * D], weight[: 8 * F, : 8 * D]
    outputs = slice(8 * start, 8 * start + 8 * F)
    residual = None if residual is None else residual[:, outputs]
    check((x, weight, bias[: 8 * F], residual), dout[:, outputs], form, "hopper")


@pytest.mark.gpu
@needs_hopper
def test_auto_takes_hopper_where_it_can():
    inputs, _ = make(70, 64, 128, torch.bfloat16, "silu")
    run = partial(call, form="silu")
    assert torch.equal(run(*inputs, impl="auto"), run(*inputs, impl="hopper"))
    inputs, _ = make(70, 60, 128, torch.bfloat16, "silu")
    assert torch.equal(run(*inputs, impl="auto"), run(*inputs, impl="triton"))


@pytest.mark.interpret
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("start", [8, 3])
def test_views_of_wider_buffers(form, start):
    # Columns from 8 on can go by TMA in 16 bits, those from 3 on cannot.
    (x, weight, bias, residual), dout = make(70, 48, 96, torch.float16, form)
    x, weight, bias = x[:, start : start + 32], weight[16:80, :32], bias[:64]
    residual = None if residual is None else residual[:, start : start + 64]
    check((x, weight, bias, residual), dout[:, start : start + 64], form)
    check(
        (x[:32].T, weight, bias, None if residual is None else residual[:32]), dout[:32, :64], form
    )


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, in the interpreter
@pytest.mark.parametrize(
    ("impl", "D"),
    [
        ("triton", 40),
        pytest.param("hopper", 40, marks=[pytest.mark.gpu, needs_hopper]),
        pytest.param("hopper", 600, marks=[pytest.mark.gpu, needs_hopper]),
    ],
)
def test_nan_stays_in_its_row(impl, D):
    inputs, dout = make(140, D, 48, torch.float16, "silu")
    run = partial(call, form="silu", impl=impl)
    clean = outputs_and_gradients(run, inputs, dout)
    x = inputs[0].clone()
    x[5, 3], x[70, 0] = torch.nan, torch.inf
    found = outputs_and_gradients(run, (x, *inputs[1:]), dout)
    others = [i for i in range(140) if i not in (5, 70)]
    assert torch.equal(found[0][others], clean[0][others])
    assert torch.equal(found[1][others], clean[1][others])


@pytest.mark.interpret
def test_keeps_z_only_where_a_gradient_needs_it():
    (x, weight, bias, _), _ = make(9, 16, 24, torch.float16, "silu")
    forward = torch.ops.gr.linear
    assert forward(x, weight, bias, None, 24, False)[1].shape == (0, 24)
    y = call(x, weight.requires_grad_(), bias, None, form="silu", impl="triton")
    assert y.requires_grad
    with torch.no_grad():
        assert torch.equal(call(x, weight, bias, None, form="silu", impl="triton"), y)
    with pytest.raises(ValueError, match="keep=True"):
        forward(x, weight, bias, None, 24, False)


@pytest.mark.interpret
def test_registration():
    forms = (("silu", True), ("part_silu", True), ("residual", False), ("plain", False))
    for (form, keep), dtype in product(forms, (torch.float32, torch.float16)):
        inputs, _ = make(6, 16, 24, dtype, form)
        leaves = [x if x is None else x.requires_grad_() for x in inputs]
        torch.library.opcheck(torch.ops.gr.linear.default, (*leaves, columns_of(form, 24), keep))


@pytest.mark.gpu
def test_compiles_without_graph_break():
    inputs, _ = make(6, 16, 24, torch.float32, "silu")
    run = partial(call, form="silu", impl="auto")
    torch.testing.assert_close(torch.compile(run, fullgraph=True)(*inputs), run(*inputs))


@pytest.mark.gpu
@pytest.mark.xdist_group("large")
@pytest.mark.parametrize("D", [64, 60, 520])
def test_more_than_int32_elements(D):
    L, F = 2**31 // 1024 + 200, 1024
    x = torch.randn(L, D, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(F, D, device="cuda", dtype=torch.bfloat16)
    found = linear(x, weight, activation="silu")[-300:].clone()
    assert torch.equal(found, linear(x[-300:], weight, activation="silu"))


X, W = torch.ones(3, 2), torch.ones(4, 2)
X8 = torch.ones(3, 8).half()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X[0], W), {}, r"x must be \(L, D\)"),
        ((X, W.T), {}, r"weight must be \(F, 2\)"),
        ((X, W.double()), {}, "weight must be torch.float32"),
        ((X, W, torch.ones(3)), {}, r"bias must be \(4,\)"),
        ((X, W), {"residual_LF": torch.ones(3, 2)}, r"residual must be \(3, 4\)"),
        ((X, W), {"residual_LF": torch.ones(3, 4).half()}, "residual must be torch.float32"),
        ((X, W), {"activation": "relu"}, "activation must be none or silu"),
        ((X, W), {"activation": "silu", "residual_LF": torch.ones(3, 4)}, "exclude each other"),
        ((X, W.to("meta")), {}, "weight must be on cpu"),
        ((X, W), {"silu_columns": 2}, "silu_columns=2 would be ignored"),
        ((X, W), {"activation": "silu", "silu_columns": 5}, r"silu_columns must be in 1 .. 4"),
        ((X, W), {"impl": "hopper"}, "x must be float16 or bfloat16"),
        ((X.half(), W.half()), {"impl": "hopper"}, "rows of x must begin at multiples of 16 bytes"),
        ((X8, torch.ones(12, 8).half()), {"impl": "hopper"}, "multiple of 8 rows, got 12"),
    ],
)
def test_wrong_input(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        linear(*arguments, **options)
