"""Rotary embedding against complex multiplication in float64."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.rotary import Rotation, rotary
from kernels.rotary.columns import deinterleave, interleave
from kernels.rotary.op import _rotary
from tests.checks import assert_within_reference_error
from tests.kernels.evaluate import double, outputs_and_gradients

IMPLS = ["reference", pytest.param("triton", marks=pytest.mark.interpret)]
DTYPES = [torch.float32, torch.float16]


def make(L, H, K, dtype, device, *, sets=1, view=False, seed=0):
    generator = torch.Generator(device).manual_seed(seed)
    draw = partial(torch.randn, generator=generator, device=device)
    x = draw(L, 3, H, K).to(dtype)[:, 1] if view else draw(L, H, K).to(dtype)
    return x, draw(L, sets, K // 2, dtype=torch.float64) * 20, draw(L, H, K).to(dtype)


def by_complex_numbers(x, angle):
    a, b = x.chunk(2, dim=-1)
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1)


def check(x, angle, dout, impl):
    rotation = Rotation.of(angle).cos.float(), angle.sin().float()
    rotation = Rotation(*rotation)
    got = outputs_and_gradients(lambda x: rotary(x, rotation, impl=impl), (x,), dout)
    low = outputs_and_gradients(lambda x: rotary(x, rotation, impl="reference"), (x,), dout)
    # The angles as float32 holds them, so that only the operator's own rounding is judged.
    exact = torch.atan2(rotation.sin.double(), rotation.cos.double())
    high = outputs_and_gradients(
        lambda x: by_complex_numbers(x, exact), double((x,)), dout.double()
    )
    for actual, same, fp64 in zip(got, low, high, strict=True):
        assert actual.dtype == x.dtype
        if actual.numel():
            assert_within_reference_error(actual, same, fp64)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(1, 1, 2), (0, 2, 8), (37, 3, 20), (130, 2, 64)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_multiplication_by_a_complex_number(shape, dtype, impl, device):
    for sets, view in ((1, True), (shape[1], False)):
        check(*make(*shape, dtype, device, sets=sets, view=view), impl)


@pytest.mark.gpu
@pytest.mark.parametrize("K", [64, 128, 256])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
def test_large_is_multiplication_by_a_complex_number(K, dtype):
    for sets, view in ((1, True), (4, False)):
        check(*make(4099, 4, K, dtype, "cuda", sets=sets, view=view), "triton")


@pytest.mark.interpret
@settings(deadline=None, max_examples=12)
@given(
    L=st.integers(0, 70),
    H=st.integers(1, 4),
    pairs=st.integers(1, 40),
    per_head=st.booleans(),
    view=st.booleans(),
    seed=st.integers(0, 9),
)
def test_triton_any_shape(L, H, pairs, per_head, view, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sets = H if per_head else 1
    case = make(L, H, 2 * pairs, torch.float32, device, sets=sets, view=view, seed=seed)
    check(*case, "triton")


def test_products_depend_on_differences_of_angles_only():
    x, angle, y = make(9, 2, 16, torch.float64, "cpu")
    base = angle[:, :, :1] * torch.linspace(0.1, 2, 8, dtype=torch.float64)

    def scores(shift):
        rotation = Rotation.of(base + shift * torch.linspace(0.1, 2, 8, dtype=torch.float64))
        q, k = rotary(x, rotation), rotary(y, rotation)
        return torch.einsum("qhk,phk->hqp", q, k)

    torch.testing.assert_close(scores(0.0), scores(123.4), rtol=1e-9, atol=1e-9)
    assert (scores(0.0) - torch.einsum("qhk,phk->hqp", x, y)).abs().max() > 0.1


@pytest.mark.interpret
def test_registration(device):
    x, angle, _ = make(5, 2, 8, torch.float32, device)
    cos, sin = (part.float() for part in Rotation.of(angle))
    for turn in (x, x.clone().requires_grad_()):
        torch.library.opcheck(_rotary, (turn, cos, sin, False))


@pytest.mark.gpu
def test_compiles_without_a_graph_break():
    x, angle, _ = make(50, 2, 64, torch.bfloat16, "cuda")
    rotation = Rotation(angle.cos().float(), angle.sin().float())
    compiled = torch.compile(lambda x: rotary(x, rotation) * 2, fullgraph=True)
    assert torch.equal(compiled(x), rotary(x, rotation) * 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, r: (x[0], r), r"x must be \(L, H, K\) floating"),
        (lambda x, r: (x[:, :, :7], r), "even dim"),
        (lambda x, r: (x, Rotation(r.cos[:4], r.sin)), r"rotation.cos must be \(5, 1 or 2, 4\)"),
        (lambda x, r: (x, Rotation(r.cos, r.sin.expand(5, 2, 4))), "as many as cos"),
        (lambda x, r: (x, Rotation(r.cos.double(), r.sin)), "rotation.cos must be torch.float32"),
    ],
)
def test_wrong_input(change, message):
    x, angle, _ = make(5, 2, 8, torch.float32, "cpu")
    with pytest.raises(ValueError, match=message):
        rotary(*change(x, Rotation(*(part.float() for part in Rotation.of(angle)))))


@given(st.integers(0, 3), st.integers(1, 4), st.integers(1, 5))
def test_pairs_side_by_side(rows, heads, pairs):
    x = torch.arange(rows * heads * 2 * pairs).view(rows, heads * 2 * pairs)
    moved = interleave(x, heads)
    halves = x.view(rows, heads, 2, pairs)
    assert torch.equal(moved.view(rows, heads, pairs, 2), torch.stack(halves.unbind(2), -1))
    assert torch.equal(deinterleave(moved, heads), x)
