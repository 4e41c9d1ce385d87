"""A cached sequence laid out in one place, against indexing row by row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.hstu_attention.cached import PAGE, CachedKeys
from kernels.hstu_attention.laid_out import keep_rows, laid_out
from tests.kernels.evaluate import poisoned_memory


def check(length, new, spare_pages, heads, dims, dtype, impl, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    G = -(-length // PAGE) + spare_pages
    rows = (G + 2) * PAGE
    pages = torch.randperm(G + 2, generator=generator)[:G].int()
    token = torch.arange(length)
    place = pages[token // PAGE].long() * PAGE + token % PAGE
    stored, fresh, expected = [], [], []
    for dim in dims:
        # Rows of a wider buffer, as the projection makes them; what nobody has is NaN.
        wide = torch.randint(-99, 99, (new, heads, dim * 3), generator=generator)
        own = wide.flatten(1).to(dtype)[:, heads * dim : 2 * heads * dim].unflatten(1, (heads, dim))
        old = torch.randint(-99, 99, (length, heads, dim), generator=generator).to(dtype)
        store = torch.full((rows, heads, dim), torch.nan if dtype.is_floating_point else -1)
        store = store.to(dtype)
        store[place] = old
        stored.append(store.to(device))
        fresh.append(own.to(device))
        behind = torch.zeros(G * PAGE - length, heads, dim, dtype=dtype)
        expected.append(torch.cat([old, own, behind]))
    cached = CachedKeys(
        stored[0], stored[1], None, pages[None].to(device),
        torch.tensor([length], device=device), G * PAGE,
    )  # fmt: skip
    with poisoned_memory(torch.device(device)):
        found = laid_out(*fresh, cached, impl=impl)
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == dtype
        assert torch.equal(got.cpu(), wanted)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 300), st.integers(0, 200), st.integers(0, 2), st.integers(1, 3),
    st.sampled_from([(8, 8), (16, 24), (5, 7)]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.integers(0, 99),
)  # fmt: skip
def test_reference(length, new, spare_pages, heads, dims, dtype, seed):
    check(length, new, spare_pages, heads, dims, dtype, "reference", "cpu", seed)


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("length", "new", "spare_pages", "heads", "dims", "dtype"),
    [
        (1, 1, 1, 1, (16, 16), torch.float32),
        (127, 65, 1, 2, (8, 24), torch.float16),
        (128, 130, 0, 3, (16, 16), torch.float32),
        (200, 3, 1, 1, (1, 1), torch.int64),  # times
    ],
)
def test_triton(length, new, spare_pages, heads, dims, dtype, device):
    check(length, new, spare_pages, heads, dims, dtype, "triton", device)


def check_kept(new, dims, dtype, impl, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(2 * PAGE, generator=generator)[:new]
    given, kept, expected = [], [], []
    for dim in dims:
        wide = torch.randint(-99, 99, (new, 3 * 2 * dim), generator=generator).to(dtype)
        own = wide[:, 2 * dim : 4 * dim].unflatten(1, (2, dim))
        store = torch.randint(-99, 99, (2 * PAGE, 2, dim), generator=generator).to(dtype)
        expected.append(store.clone())
        expected[-1][rows] = own
        given.append(own.to(device))
        kept.append(store.to(device))
    keep_rows(*given, rows.to(device), *kept, impl=impl)
    for got, wanted in zip(kept, expected, strict=True):
        assert torch.equal(got.cpu(), wanted)


@pytest.mark.interpret
@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(
    ("new", "dims", "dtype"),
    [(0, (8, 8), torch.float32), (1, (16, 16), torch.float16), (133, (8, 24), torch.bfloat16)],
)
def test_rows_are_kept(impl, new, dims, dtype, device):
    check_kept(new, dims, dtype, impl, device)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 8192, 8193])
def test_of_the_sizes_that_are_served(length):
    check(length, 4096, 3, 4, (128, 128), torch.bfloat16, "triton", "cuda")


def test_rows_that_differ_are_refused():
    cached = CachedKeys(
        torch.zeros(PAGE, 2, 8), torch.zeros(PAGE, 2, 16), None,
        torch.zeros(1, 1, dtype=torch.int32), torch.tensor([3]), PAGE,
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"v must be \(R, 2, 16\) torch.float32 .* got \(4, 2, 8\)"
    ):
        laid_out(torch.zeros(4, 2, 8), torch.zeros(4, 2, 8), cached)
    with pytest.raises(ValueError, match="k must be"):
        laid_out(torch.zeros(4, 2, 8).half(), torch.zeros(4, 2, 16), cached)
