from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from kernels.layer_norm import layer_norm, layer_norm_backward, layer_norm_fp8
from tests.checks import assert_within_reference_error
from tests.kernels.evaluate import double, outputs_and_gradients, poisoned_memory
from tests.kernels.fp8 import FP8_CHECKS, assert_rounded, assert_within_a_step

EPS = 1e-6
DTYPES = [torch.float32, torch.float16]
IMPLS = ["reference", pytest.param("triton", marks=pytest.mark.interpret)]


def oracle(x, weight, bias):
    """Layer norm in float64 by torch's own operator."""
    return functional.layer_norm(x, x.shape[1:], weight, bias, EPS)


def make(L, D, dtype, device, affine=(True, True), seed=0):
    generator = torch.Generator(device).manual_seed(seed)
    draw = partial(torch.randn, generator=generator, device=device)
    x = (draw(L, D) * 2 + 3).to(dtype)
    weight = draw(D).to(dtype) if affine[0] else None
    bias = draw(D).to(dtype) if affine[1] else None
    return (x, weight, bias), draw(L, D).to(dtype)


def check(inputs, dout, impl):
    got = outputs_and_gradients(partial(layer_norm, eps=EPS, impl=impl), inputs, dout)
    low = outputs_and_gradients(partial(layer_norm, eps=EPS, impl="reference"), inputs, dout)
    high = outputs_and_gradients(oracle, double(inputs), dout.double())
    for i, (actual, same, exact) in enumerate(zip(got, low, high, strict=True)):
        assert actual.dtype == same.dtype
        if actual.numel():
            scale = scale_of_dx(inputs, dout) if i == 1 else None
            assert_within_reference_error(actual, same, exact, scale=scale)


def scale_of_dx(inputs, dout):
    """The terms of dx = rstd (g - mean(g) - ...) cancel: in a row of one column, to zero."""
    x, weight, _ = double(inputs)
    g = dout.double() * (1 if weight is None else weight)
    return (g.abs() * (x.var(1, correction=0, keepdim=True) + EPS).rsqrt()).max().item()


@pytest.mark.parametrize("affine", [(True, True), (False, False), (True, False), (False, True)])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (0, 8), (3, 1025)], ids=str)
def test_reference_is_layer_norm(shape, affine, device):
    inputs, dout = make(*shape, torch.float32, device, affine)
    got = outputs_and_gradients(partial(layer_norm, impl="reference"), double(inputs), dout)
    high = outputs_and_gradients(oracle, double(inputs), dout)
    for actual, exact in zip(got, high, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-11, atol=1e-11)


@pytest.mark.interpret
@pytest.mark.parametrize("affine", [(True, True), (False, False), (True, False), (False, True)])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (0, 8), (3, 1025), (67, 64)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_within_error_budget(shape, dtype, affine, device):
    check(*make(*shape, dtype, device, affine), "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 512, 1000, 1024, 2048, 8192])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
def test_large_within_error_budget(D, dtype):
    check(*make(4099, D, dtype, "cuda"), "triton")


@pytest.mark.interpret
@settings(deadline=None, max_examples=15)
@given(L=st.integers(0, 70), D=st.integers(16, 150), seed=st.integers(0, 9))
def test_triton_any_shape(L, D, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # In rows of a few columns these can be nearly equal: both implementations then lose digits in
    # their difference, and which loses more is chance.
    check(*make(L, D, torch.float32, device, seed=seed), "triton")


@pytest.mark.interpret
def test_strided_rows(device):
    (wide, weight, bias), dout = make(9, 96, torch.float32, device)
    inputs = (wide[:, 16:64], weight[:48], bias[:48])
    check(inputs, dout[:, 32:80], "triton")
    check((wide.T[:9, :9], weight[:9], bias[:9]), dout[:, :9].T, "triton")


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, in the interpreter
def test_nan_stays_in_its_row(device):
    (x, weight, bias), dout = make(20, 48, torch.float32, device)
    clean = outputs_and_gradients(partial(layer_norm, impl="triton"), (x, weight, bias), dout)
    x = x.clone()
    x[5, 3], x[11, 0] = torch.nan, torch.inf
    out, dx, *_ = outputs_and_gradients(partial(layer_norm, impl="triton"), (x, weight, bias), dout)
    others = [i for i in range(20) if i not in (5, 11)]
    assert torch.equal(out[others], clean[0][others])
    assert torch.equal(dx[others], clean[1][others])
    assert out[5].isnan().all()


def check_fp8(inputs, impl):
    x = inputs[0]
    with poisoned_memory(x.device):
        found = layer_norm_fp8(*inputs, eps=EPS, keep=True, impl=impl)
        alone = layer_norm_fp8(*inputs, eps=EPS, impl=impl)
    assert alone.y is None
    assert_within_a_step(found.y, layer_norm(*inputs, eps=EPS, impl=impl))
    if x.shape[0]:
        exact = oracle(*double(inputs))
        for rows in (found.rows, alone.rows):
            assert_rounded(rows, exact, error=1e-5 * (1 + exact.abs().max()))
    return found


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("affine", [(True, True), (False, False), (True, False), (False, True)])
@pytest.mark.parametrize("shape", [(0, 8), (7, 33), (67, 64)], ids=str)
def test_fp8_is_the_norm_rounded_once(shape, affine, impl, device):
    inputs, dout = make(*shape, torch.float16, device, affine)
    found = check_fp8(inputs, impl)
    if impl == "triton":
        x, weight, bias = inputs
        parts = (x, weight, bias is not None, found.mean, found.rstd)
        gradients = layer_norm_backward(dout, *parts)
        run = partial(layer_norm, eps=EPS, impl="triton")
        expected = outputs_and_gradients(run, inputs, dout)[1:]
        wanted = [g for g, t in zip(gradients, inputs, strict=True) if t is not None]
        for actual, same in zip(wanted, expected, strict=True):
            assert_within_a_step(actual.to(same.dtype), same)


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 512, 1000, 1024, 2048, 8192])
def test_fp8_large(D):
    check_fp8(make(4099, D, torch.bfloat16, "cuda")[0], "triton")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, in the interpreter
def test_fp8_marks_a_broken_row(impl, device):
    inputs, _ = make(9, 40, torch.float16, device)
    clean = layer_norm_fp8(*inputs, impl=impl).rows
    inputs[0][4, 7] = torch.inf
    found = layer_norm_fp8(*inputs, impl=impl).rows
    assert found.scale[4].isnan()
    assert not found.values[4].float().any()
    others = [i for i in range(9) if i != 4]
    for actual, expected in zip(found, clean, strict=True):
        assert torch.equal(actual[others].float(), expected[others].float())


@pytest.mark.interpret
def test_registration(device):
    (x, weight, bias), _ = make(6, 20, torch.float32, device)
    for w, b in ((weight, bias), (None, None)):
        args = [t if t is None else t.requires_grad_() for t in (x, w, b)]
        torch.library.opcheck(torch.ops.gr.layer_norm.default, (*args, EPS))
        arguments = (x.detach(), w, b, EPS, w is None)
        torch.library.opcheck(torch.ops.gr.layer_norm_fp8.default, arguments, test_utils=FP8_CHECKS)


@pytest.mark.gpu
def test_compiles_without_graph_break():
    (x, weight, bias), _ = make(6, 20, torch.float32, "cuda")
    compiled = torch.compile(layer_norm, fullgraph=True)(x, weight, bias)
    torch.testing.assert_close(compiled, layer_norm(x, weight, bias))


@pytest.mark.gpu
@pytest.mark.xdist_group("large")
def test_more_than_int32_elements():
    L, D = 2**31 // 1024 + 8, 1024
    x = torch.empty(L, D, device="cuda", dtype=torch.bfloat16)
    x[-8:] = torch.randn(8, D, device="cuda")
    y = layer_norm(x)
    torch.testing.assert_close(y[-8:], layer_norm(x[-8:].clone()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3),), r"x must be \(L, D\)"),
        ((torch.ones(3, 0),), "D > 0"),
        ((torch.ones(3, 2, dtype=torch.long),), "floating"),
        ((torch.ones(3, 2), torch.ones(3)), r"weight must be \(2,\)"),
        ((torch.ones(3, 2), None, torch.ones(2, 1)), r"bias must be \(2,\)"),
        ((torch.ones(3, 2), torch.ones(2, device="meta")), "weight must be on cpu"),
    ],
)
def test_wrong_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        layer_norm(*arguments)


@pytest.mark.interpret
def test_wrong_input_of_triton(device):
    with pytest.raises(ValueError, match="16384"):
        layer_norm(torch.ones(1, 20000, device=device), impl="triton")
    with pytest.raises(ValueError, match="float64"):
        layer_norm(torch.ones(1, 2, device=device, dtype=torch.float64), impl="triton")
