"""4-bit rows against FBGEMM's own operators, and arithmetic on their bytes."""

import fbgemm_gpu  # noqa: F401  (registers the operators)
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.int4_rows import dequantize_int4, row_bytes

IMPLS = ["reference", pytest.param("triton", marks=pytest.mark.interpret)]


def packed_rows(num_rows, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, dim, generator=generator)
    rows *= torch.logspace(-4, 3, num_rows)[:, None] if num_rows else 1
    return torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(rows, 4)


def by_fbgemm(rows):
    return torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(rows, 4)


def by_bytes(rows, index):
    """Values of chosen rows, byte by byte in float64."""
    out = []
    for row in rows.numpy()[index]:
        scale, bias = row[-4:].view(np.float16).astype(np.float64)
        halves = [half for byte in row[:-4] for half in (byte % 16, byte // 16)]
        out.append([half * scale + bias for half in halves])
    return torch.tensor(np.array(out))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dim", [4, 12, 64, 128])
def test_is_what_fbgemm_reads(dim, impl, device):
    rows = packed_rows(37, dim)
    assert rows.shape == (37, row_bytes(dim))
    got = dequantize_int4(rows.to(device), impl=impl).cpu()
    expected = by_fbgemm(rows)
    assert got.dtype == torch.float32
    # One or two roundings in float32, as a compiler has it.
    largest = expected.abs().amax(1, keepdim=True)
    assert ((got - expected).abs() <= 2**-22 * largest).all()
    half = dequantize_int4(rows.to(device), dtype=torch.float16, impl=impl).cpu()
    torch.testing.assert_close(half, expected.half(), rtol=2**-10, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
@given(st.data())
@settings(max_examples=12, deadline=None)
def test_any_rows_in_any_order(impl, data):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    num_rows = data.draw(st.integers(1, 9))
    dim = 4 * data.draw(st.integers(1, 9))
    index = data.draw(st.lists(st.integers(0, num_rows - 1), max_size=20))
    rows = packed_rows(num_rows, dim, seed=data.draw(st.integers(0, 99)))
    index_R = torch.tensor(index, dtype=torch.int64)
    got = dequantize_int4(rows.to(device), index_R.to(device), impl=impl).cpu()
    assert got.shape == (len(index), dim)
    if index:
        exact = by_bytes(rows, index)
        assert ((got - exact).abs() <= 2**-22 * exact.abs().amax(1, keepdim=True)).all()


@pytest.mark.interpret
def test_operator_and_graph(device):
    rows, index = packed_rows(5, 12).to(device), torch.tensor([3, 0, 3], device=device)
    for chosen in (index, None):
        arguments = (rows, chosen, torch.float16)
        torch.library.opcheck(torch.ops.gr.dequantize_int4.default, arguments)

        def read(rows, chosen=chosen):
            return dequantize_int4(rows, chosen, dtype=torch.float16, impl="triton") * 2

        compiled = torch.compile(read, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(rows), read(rows), rtol=0, atol=0)


@pytest.mark.interpret
def test_a_row_that_is_not_there_is_nan(device):
    rows = packed_rows(3, 8).to(device)
    got = dequantize_int4(rows, torch.tensor([1, 3, -1], device=device), impl="triton")
    assert got.isnan().all(1).tolist() == [False, True, True]


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 512])
def test_a_gpu_reads_rows_of_host_memory(dim):
    rows = packed_rows(5000, dim).pin_memory()
    index = torch.randint(5000, (20000,), generator=torch.Generator().manual_seed(1))
    got = dequantize_int4(rows, index.cuda())
    copied = dequantize_int4(rows[index].cuda())
    assert torch.equal(got, copied)
    expected = by_fbgemm(rows)[index]
    assert ((got.cpu() - expected).abs() <= 2**-22 * expected.abs().amax(1, keepdim=True)).all()


def test_wrong_input_says_what_is_expected():
    rows = packed_rows(3, 8)
    with pytest.raises(ValueError, match="uint8"):
        dequantize_int4(rows.float())
    with pytest.raises(ValueError, match="multiple of 4"):
        dequantize_int4(rows[:, :4].contiguous())
    with pytest.raises(ValueError, match="float64"):
        dequantize_int4(rows, dtype=torch.float64)
    with pytest.raises(ValueError, match="int64"):
        dequantize_int4(rows, torch.zeros(2))
    with pytest.raises(IndexError):
        dequantize_int4(rows, torch.tensor([3]), impl="reference")
