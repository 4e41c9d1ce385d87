"""Tables in 4 bits against arithmetic in numpy, by the definition of the format."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings.int4 import Int4Table, quantize_int4


def levels(row):
    """The 16 values that a row can have, of its float16 scale and bias."""
    bias = np.float16(row.min())
    scale = np.float16((row.max() - np.float32(bias)) / 15)
    return np.float32(bias) + np.arange(16) * np.float64(scale)


@given(
    seed=st.integers(0, 999),
    num_rows=st.integers(1, 12),
    quarter=st.integers(1, 16),
    magnitude=st.floats(1e-3, 1e3),
)
@settings(max_examples=25, deadline=None)
def test_a_value_becomes_the_nearest_of_16_levels(seed, num_rows, quarter, magnitude):
    rows = np.random.default_rng(seed).normal(size=(num_rows, 4 * quarter)) * magnitude
    rows = rows.astype(np.float32)
    table = Int4Table(quantize_int4(torch.from_numpy(rows)))
    got = table.lookup(torch.arange(num_rows)).numpy()
    for row, values in zip(rows, got, strict=True):
        of_row = levels(row)
        nearest = np.abs(row[:, None] - of_row[None, :]).min(1)
        step = of_row[1] - of_row[0]
        assert (np.abs(values - row) <= nearest + 1e-3 * step + 1e-6 * np.abs(row).max()).all()


def test_a_constant_row_stays():
    rows = torch.tensor([[0.0] * 8, [3.0] * 8, [-0.1] * 8])
    got = Int4Table(quantize_int4(rows)).lookup(torch.tensor([2, 1, 0]))
    assert torch.equal(got[1:], rows[:2].flip(0))
    torch.testing.assert_close(got[0], rows[2], rtol=2**-11, atol=0)


def test_chunks_are_the_whole():
    rows = torch.randn(100, 16)
    chunks = [(first, rows[first : first + 33]) for first in range(0, 100, 33)]
    table = Int4Table.of_chunks(chunks, 100, 16, name="item")
    assert torch.equal(table.rows_EW.cpu(), quantize_int4(rows))
    assert (table.num_rows, table.dim, table.num_bytes) == (100, 16, 100 * 12)
    with pytest.raises(ValueError, match=r"item: expected a chunk from row 33 on, .* from 66"):
        Int4Table.of_chunks([chunks[0], chunks[2]], 100, 16, name="item")
    with pytest.raises(ValueError, match="item: expected 100 rows, the chunks hold 33"):
        Int4Table.of_chunks(chunks[:1], 100, 16, name="item")


def test_what_4_bits_cannot_hold_names_table_and_row():
    rows = torch.randn(4, 8)
    rows[2, 3] = float("nan")
    with pytest.raises(ValueError, match="item: row 12 holds NaN"):
        quantize_int4(rows, name="item", first=10)
    rows[2, 3] = 1e5
    with pytest.raises(ValueError, match=r"row 2 .* beyond 65504"):
        quantize_int4(rows)
    with pytest.raises(ValueError, match="multiple of 4"):
        quantize_int4(torch.randn(4, 6))
    with pytest.raises(IndexError):
        Int4Table(quantize_int4(torch.randn(4, 8))).lookup(torch.tensor([4]))


@pytest.mark.gpu
def test_an_index_on_either_side_gives_the_same_rows_on_the_gpu():
    rows = torch.randn(1000, 128)
    table = Int4Table(quantize_int4(rows))
    index = torch.randint(1000, (4096,), generator=torch.Generator().manual_seed(0))
    host = table.lookup(index, device="cuda", dtype=torch.bfloat16)
    gpu = table.lookup(index.cuda(), dtype=torch.bfloat16)
    assert host.is_cuda
    assert torch.equal(host, gpu)
    assert torch.equal(gpu.float().cpu(), table.lookup(index, device="cpu").bfloat16().float())
