from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.position_time import position_time
from tests.checks import assert_within_reference_error
from tests.kernels.evaluate import double, outputs_and_gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def oracle(x, position_table, position, time_table, time, *, scale):
    """Row by row; gradients by autograd through the rows."""
    rows = [x[:0]]
    for i in range(x.shape[0]):
        row = scale * x[i] + position_table[int(position[i])]
        rows.append((row if time is None else row + time_table[int(time[i])])[None])
    tables = position_table.sum() if time is None else position_table.sum() + time_table.sum()
    return torch.cat(rows) + 0 * tables


def make(L, D, P, T, dtype, device=DEVICE, table_dtype=None, skew=1.0, seed=0):
    """Inputs; a skew above 1 gives low indices to most rows."""
    generator = torch.Generator(device).manual_seed(seed)
    draw = partial(torch.randn, generator=generator, device=device)

    def index(rows):
        uniform = torch.rand(L, generator=generator, device=device, dtype=torch.float64)
        return (uniform**skew * rows).long()

    tables = (
        draw(P, D).to(table_dtype or dtype),
        draw(T, D).to(table_dtype or dtype) if T else None,
    )
    inputs = (draw(L, D).to(dtype), tables[0], index(P), tables[1], index(T) if T else None)
    return inputs, draw(L, D).to(dtype)


def check(inputs, dout, scale=1.0, impl="triton"):
    got, low = (
        outputs_and_gradients(partial(position_time, scale=scale, impl=kind), inputs, dout)
        for kind in (impl, "reference")
    )
    high = outputs_and_gradients(
        partial(position_time, scale=scale, impl="reference"), double(inputs), dout.double()
    )
    # Of the output, dx, and the gradient of each table.
    scales = [None, None, sum_of_magnitudes(*inputs[1:3], dout)]
    if inputs[3] is not None:
        scales.append(sum_of_magnitudes(*inputs[3:5], dout))
    for actual, same, exact, scale in zip(got, low, high, scales, strict=True):
        assert actual.dtype == same.dtype
        if actual.numel():
            assert_within_reference_error(actual, same, exact, scale=scale)


def sum_of_magnitudes(table, index, dout):
    """The gradient of a row of a table is a sum whose terms can cancel."""
    return torch.zeros_like(table.double()).index_add(0, index, dout.double().abs()).max().item()


@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("T", [0, 5])
@pytest.mark.parametrize("L", [0, 1, 30])
def test_reference_is_its_formula(L, T, scale):
    inputs, dout = make(L, 6, 4, T, torch.float64)
    found = outputs_and_gradients(
        partial(position_time, scale=scale, impl="reference"), inputs, dout
    )
    expected = outputs_and_gradients(partial(oracle, scale=scale), inputs, dout)
    for actual, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-13, atol=1e-13)


@pytest.mark.interpret
@pytest.mark.parametrize("dtypes", [(torch.float32, None), (torch.float16, torch.float32)], ids=str)
@pytest.mark.parametrize("T", [0, 5])
@pytest.mark.parametrize(("L", "D", "P"), [(0, 8, 3), (1, 1, 1), (300, 20, 3), (129, 300, 40)])
def test_triton_within_error_budget(L, D, P, T, dtypes):
    check(*make(L, D, P, T, dtypes[0], table_dtype=dtypes[1], skew=3.0), scale=D**0.5)


@pytest.mark.interpret
@settings(deadline=None, max_examples=8)
@given(
    L=st.integers(0, 160),
    D=st.integers(1, 40),
    P=st.integers(1, 50),
    T=st.integers(0, 9),
    skew=st.sampled_from([1.0, 20.0]),
)
def test_triton_any_shape(L, D, P, T, skew):
    check(*make(L, D, P, T, torch.float32, skew=skew))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D", [64, 512, 1000, 2048])
def test_large_within_error_budget(D, dtype):
    check(*make(4099, D, 1024, 2049, dtype, table_dtype=torch.float32, skew=4.0), scale=D**0.5)


@pytest.mark.interpret
def test_strided_rows():
    (x, *rest), dout = make(9, 24, 3, 4, torch.float32)
    rest[0], rest[2] = rest[0][:, :8], rest[2][:, 5:13]
    check((x[:, 4:12], *rest), dout[:, 10:18])


@pytest.mark.interpret
def test_gradients_of_tables_are_the_same_every_time():
    inputs, dout = make(1000, 16, 3, 4, torch.float32, skew=8.0)
    runs = [
        outputs_and_gradients(partial(position_time, impl="triton"), inputs, dout) for _ in range(3)
    ]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.interpret
def test_bad_index_on_a_device_is_nan_and_touches_nothing_else():
    (x, table, index, _, _), dout = make(200, 8, 5, 0, torch.float32)
    clean = outputs_and_gradients(partial(position_time, impl="triton"), (x, table, index), dout)
    wrong = index.clone()
    wrong[3], wrong[150] = 5, -1
    leaves = [x.clone().requires_grad_(), table.clone().requires_grad_()]
    # Straight to the operator: on the CPU the wrapper refuses such an index.
    out = torch.ops.gr.position_time(*leaves, wrong, None, None, 1.0)
    dx, dtable = torch.autograd.grad(out, leaves, dout)
    others = [i for i in range(200) if i not in (3, 150)]
    assert out[[3, 150]].isnan().all()
    assert torch.equal(out[others], clean[0][others])
    expected = clean[2].double().index_add(0, index[[3, 150]], -dout[[3, 150]].double())
    torch.testing.assert_close(dtable.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(dx, clean[1])


@pytest.mark.interpret
def test_registration():
    inputs, _ = make(6, 20, 3, 4, torch.float32)
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in inputs]
    torch.library.opcheck(torch.ops.gr.position_time.default, (*leaves, 2.0))
    torch.library.opcheck(torch.ops.gr.position_time.default, (*leaves[:3], None, None, 1.0))
    arguments = (inputs[0].detach(), [inputs[2], inputs[4]], [3, 4])
    torch.library.opcheck(torch.ops.gr.sum_by_index.default, arguments)


@pytest.mark.gpu
def test_compiles_without_graph_break():
    inputs, _ = make(6, 20, 3, 4, torch.float32)
    compiled = torch.compile(position_time, fullgraph=True)(*inputs)
    torch.testing.assert_close(compiled, position_time(*inputs))


@pytest.mark.gpu
@pytest.mark.xdist_group("large")
def test_more_than_int32_elements():
    L, D = 2**31 // 1024 + 8, 1024
    x = torch.empty(L, D, device="cuda", dtype=torch.bfloat16)
    x[-8:] = torch.randn(8, D, device="cuda")
    table = torch.randn(3, D, device="cuda")
    index = torch.randint(0, 3, (L,), device="cuda")
    expected = position_time(x[-8:], table, index[-8:])
    assert torch.equal(position_time(x, table, index)[-8:], expected)
    x[:-8] = 0
    found = torch.ops.gr.sum_by_index(x, [index], [3])
    expected = torch.zeros(3, D, device="cuda").index_add_(0, index[-8:], x[-8:].float())
    torch.testing.assert_close(found, expected)


X, TABLE, INDEX = torch.ones(3, 2), torch.ones(4, 2), torch.tensor([0, 1, 3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X[0], TABLE, INDEX), r"x must be \(L, D\)"),
        ((X, TABLE[:, :1], INDEX), r"position_table must be \(rows, 2\)"),
        ((X, TABLE, INDEX[:2]), r"position must be \(3,\) int64"),
        ((X, TABLE, INDEX.int()), r"position must be \(3,\) int64"),
        ((X, TABLE, INDEX + 1), "position must be in 0 .. 3, .* from 1 to 4"),
        ((X, TABLE, INDEX - 1), "position must be in 0 .. 3, .* from -1 to 2"),
        ((X, TABLE, INDEX, TABLE), "got no time$"),
        ((X, TABLE, INDEX, None, INDEX), "got no time_table"),
        ((X, TABLE, INDEX, TABLE[:3], INDEX), "time must be in 0 .. 2"),
        ((X, TABLE.to("meta"), INDEX), "must be on cpu"),
    ],
)
def test_wrong_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        position_time(*arguments)
