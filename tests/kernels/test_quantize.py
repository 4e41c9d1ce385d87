import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.quantize import quantize_rows, transpose_rows
from tests.kernels.evaluate import poisoned_memory
from tests.kernels.fp8 import FP8_CHECKS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["reference", pytest.param("triton", marks=pytest.mark.interpret)]
DTYPES = [torch.float32, torch.float16]
# Every finite value of e4m3, ascending.
GRID = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
GRID = GRID[GRID.isfinite()].unique()


def make(L, D, dtype, seed=0, device=DEVICE):
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(L, D, generator=generator, device=device)
    sizes = torch.randn(L, 1, generator=generator, device=device).exp()
    return (x * sizes).to(dtype)


def run(x, impl):
    with poisoned_memory(x.device):
        return quantize_rows(x, impl=impl)


def nearest(x):
    """The nearest value of the grid, ties to the even code, by looking at every one of them."""
    distance = (x.double().cpu()[:, None] - GRID[None, :]).abs()
    best = distance == distance.min(1, keepdim=True).values
    even = (GRID.to(torch.float8_e4m3fn).view(torch.uint8) & 1) == 0
    choice = torch.where(best.sum(1, keepdim=True) > 1, best & even, best)
    return GRID[choice.int().argmax(1)]


def least_scale(row):
    """The least power of two that brings a row within 448, by trying them in turn."""
    scale = 2.0**-60
    while row.double().abs().max() / scale > 448:
        scale *= 2
    return scale


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounds_to_the_nearest_value_of_e4m3(dtype, impl):
    x = make(13, 70, dtype)
    q, scale = run(x, impl)
    assert q.dtype == torch.float8_e4m3fn
    assert scale.dtype == torch.float32
    for row, row_q, row_scale in zip(x, q, scale, strict=True):
        assert row_scale.item() == least_scale(row)
        assert torch.equal(row_q.double().cpu(), nearest(row.double() / row_scale.item()))
        assert row_q.float().abs().max() > 200


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("top", [448.0, 448.0 + 2**-15, 449.0, 224.0, 1e-30, 2.0**-60, 3e38])
def test_scale_of_one_value(top, impl):
    x = torch.tensor([[top, -top / 3]], device=DEVICE)
    q, scale = run(x, impl)
    assert scale.item() == least_scale(x)
    assert torch.equal(q[0].double().cpu(), nearest(x[0].double() / scale.item()))


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_and_small_values(impl):
    # The first value fixes the scale at 1: the others are rounded as they are.
    steps = torch.arange(0, 40) * 2.0**-10
    halves = (GRID[:-1] + GRID[1:]).float() / 2
    x = torch.cat([torch.tensor([448.0]), steps, -steps, halves, GRID.float()])[None].to(DEVICE)
    q, scale = run(x, impl)
    assert scale.item() == 1
    assert torch.equal(q[0].double().cpu(), nearest(x[0]))


@pytest.mark.parametrize("impl", IMPLS)
def test_zero_tiny_and_broken_rows(impl):
    x = make(6, 9, torch.float32)
    x[1] = 0
    x[2] = 1e-22
    x[3, 4] = torch.nan
    x[4, 0] = -torch.inf
    q, scale = run(x, impl)
    assert not q[1:5].float().any()
    assert scale[[1, 2]].isfinite().all()
    assert scale[[3, 4]].isnan().all()
    clean_q, clean_scale = run(x[[0, 5]], impl)
    assert torch.equal(q[[0, 5]].float(), clean_q.float())
    assert torch.equal(scale[[0, 5]], clean_scale)


@pytest.mark.interpret
@settings(deadline=None, max_examples=15)
@given(
    L=st.integers(0, 40),
    D=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 9),
)
def test_triton_gives_the_bits_of_the_reference(L, D, dtype, seed):
    x = make(L, D, dtype, seed)
    for actual, expected in zip(run(x, "triton"), run(x, "reference"), strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D", [64, 512, 1000, 2048, 8192])
def test_large_gives_the_bits_of_the_reference(D, dtype):
    x = make(4099, D, dtype)
    for actual, expected in zip(run(x, "triton"), run(x, "reference"), strict=True):
        assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))


def make_transposed(L, D, seed, factors):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    code = torch.randint(0, 256, (L, D), generator=generator, device=DEVICE, dtype=torch.uint8)
    code[code & 0x7F == 0x7F] = 0
    exponent = torch.randint(-12, 3, (L,), generator=generator, device=DEVICE)
    return code.view(torch.float8_e4m3fn), torch.exp2(exponent.float()) if factors else None


@pytest.mark.parametrize("factors", [False, True])
def test_transposed_reference_is_its_formula(factors):
    q, factor = make_transposed(21, 9, 0, factors)
    found = transpose_rows(q, factor, impl="reference")
    assert found.shape == (9, 32)
    assert not found[:, 21:].view(torch.uint8).any()
    for i in range(21):
        value = q[i].double() * (1 if factor is None else factor[i].item())
        assert torch.equal(found[:, i].double().cpu(), nearest(value.clamp(-448, 448)))


@pytest.mark.interpret
@settings(deadline=None, max_examples=15)
@given(L=st.integers(0, 300), D=st.integers(1, 300), factors=st.booleans(), seed=st.integers(0, 9))
def test_transposed_bytes_are_those_of_the_reference(L, D, factors, seed):
    q, factor = make_transposed(L, D, seed, factors)
    with poisoned_memory(q.device):
        found = transpose_rows(q, factor, impl="triton")
    expected = transpose_rows(q, factor, impl="reference")
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("shape", [(8192, 512), (4100, 1000), (20001, 2048)], ids=str)
def test_large_transposed_bytes(shape, factors):
    q, factor = make_transposed(*shape, 0, factors)
    found, expected = (transpose_rows(q, factor, impl=kind) for kind in ("triton", "reference"))
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.interpret
def test_strided_rows():
    x = make(9, 64, torch.float32)
    for view in (x[:, 8:40], x.T):
        for actual, expected in zip(run(view, "triton"), run(view, "reference"), strict=True):
            assert torch.equal(actual.float(), expected.float())


@pytest.mark.interpret
def test_registration():
    torch.library.opcheck(torch.ops.gr.quantize_rows.default, (make(5, 20, torch.float32),))
    for factors in (False, True):
        arguments = make_transposed(5, 20, 0, factors)
        torch.library.opcheck(
            torch.ops.gr.transpose_rows.default,
            arguments,
            test_utils=FP8_CHECKS,
        )


@pytest.mark.gpu
def test_compiles_without_graph_break():
    x = make(5, 20, torch.float32)
    compiled = torch.compile(quantize_rows, fullgraph=True)(x)
    for actual, expected in zip(compiled, quantize_rows(x), strict=True):
        assert torch.equal(actual.float(), expected.float())
    found = torch.compile(transpose_rows, fullgraph=True)(*compiled)
    assert torch.equal(found.float(), transpose_rows(*compiled).float())


@pytest.mark.gpu
@pytest.mark.xdist_group("large")
def test_more_than_int32_elements():
    L, D = 2**31 // 1024 + 8, 1024
    x = torch.zeros(L, D, device="cuda", dtype=torch.bfloat16)
    x[-8:] = torch.randn(8, D, device="cuda")
    q, scale = quantize_rows(x)
    expected, expected_scale = quantize_rows(x[-8:])
    assert torch.equal(q[-8:].float(), expected.float())
    assert torch.equal(scale[-8:], expected_scale)


Q = torch.ones(3, 2).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(3), r"x must be \(L, D\)"),
        (torch.ones(3, 0), "D > 0"),
        (torch.ones(3, 2, dtype=torch.float64), "float32, float16 or bfloat16"),
        (torch.ones(3, 2, dtype=torch.long), "float32, float16 or bfloat16"),
    ],
)
def test_wrong_input(x, message):
    with pytest.raises(ValueError, match=message):
        quantize_rows(x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3, 2),), "values must be .* float8_e4m3fn"),
        ((Q[0],), r"values must be \(L, D\)"),
        ((Q, torch.ones(4)), r"factor must be \(3,\) float32"),
        ((Q, torch.ones(3).double()), r"factor must be \(3,\) float32"),
    ],
)
def test_wrong_input_to_transpose(arguments, message):
    with pytest.raises(ValueError, match=message):
        transpose_rows(*arguments)
