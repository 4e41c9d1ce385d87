import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.top_k import top_k
from tests.kernels.evaluate import poisoned_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["reference", pytest.param("triton", marks=pytest.mark.interpret)]
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def integers(rows, dim, top, seed, dtype=torch.float32):
    """Vectors of small whole numbers: products are exact in every dtype, and many are equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-top, top + 1, (rows, dim), generator=generator).to(DEVICE, dtype)


def brute_force(queries, items, k, is_item=None):
    scores = queries.double().cpu() @ items.double().cpu().T
    found = []
    for row in scores.tolist():
        order = sorted(range(len(row)), key=lambda e: (-row[e], e))
        if is_item is not None:
            order = [e for e in order if is_item[e]]
        best = order[:k]
        found.append(([row[e] for e in best], best))
    pad = [k - len(rows) for _, rows in found]
    return (
        [scores + [-float("inf")] * n for (scores, _), n in zip(found, pad, strict=True)],
        [rows + [-1] * n for (_, rows), n in zip(found, pad, strict=True)],
    )


def check(queries, items, k, is_item=None, impl="reference"):
    with poisoned_memory(items.device):
        found = top_k(queries, items, k, is_item_E=is_item, impl=impl)
    scores, rows = brute_force(queries, items, k, is_item)
    assert found.rows.tolist() == rows
    assert found.scores.tolist() == scores
    assert found.scores.shape == (len(queries), k)


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_equals_brute_force(impl, data):
    num_queries, num_items = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 300))
    dim, k = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 320))
    top, seed = data.draw(st.sampled_from([0, 1, 3])), data.draw(st.integers(0, 99))
    is_item = None
    if data.draw(st.booleans()):
        share = data.draw(st.sampled_from([0.0, 0.1, 0.9]))
        is_item = torch.rand(num_items, generator=torch.Generator().manual_seed(seed)) < share
        is_item = is_item.to(DEVICE)
    queries = integers(num_queries, dim, top, seed)
    check(queries, integers(num_items, dim, top, seed + 1), k, is_item, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_queries", "num_items", "k"),
    [
        (1, 64 * 64 + 70, 1),  # groups of groups, the last of both not full
        (3, 64 * 64 * 2, 1),
        pytest.param(1, 64 * 64 * 2 + 70, 1, marks=pytest.mark.slow),
        pytest.param(3, 64 * 64 * 3, 2, marks=pytest.mark.slow),
        (67, 300, 5),  # two blocks of queries
        (1, 1, 3),
    ],
)
def test_groups_of_groups(num_queries, num_items, k, dtype, impl):
    queries = integers(num_queries, 16, 2, 0, dtype)
    check(queries, integers(num_items, 16, 2, 1, dtype), k, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_equal_scores_go_by_row_wherever_they_stand(impl):
    # All scores are equal: the first rows that are items, across groups and groups of groups.
    items = torch.ones(64 * 64 * 2 + 5, 4, device=DEVICE)
    is_item = torch.zeros(len(items), dtype=torch.bool, device=DEVICE)
    is_item[[70, 5000, 5001, len(items) - 1]] = True
    found = top_k(items[:1], items, 2, is_item_E=is_item, impl=impl)
    assert found.rows.tolist() == [[70, 5000]]
    # More of them than the lists of the kernel hold.
    assert top_k(-items[:1], items, 1, impl=impl).rows.tolist() == [[0]]
    found = top_k(items[:1], items[:5002], 7, is_item_E=is_item[:5002], impl=impl)
    assert found.rows.tolist() == [[70, 5000, 5001, -1, -1, -1, -1]]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_any_numbers_nothing_better_is_left_out(dtype, impl):
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(5, 48, generator=generator).to(DEVICE, dtype)
    items = torch.randn(2000, 48, generator=generator).to(DEVICE, dtype)
    found = top_k(queries, items, 50, impl=impl)
    exact = queries.double() @ items.double().T
    assert (found.scores - exact.gather(1, found.rows)).abs().max() < 1e-4
    assert (found.scores.diff(dim=1) <= 0).all()
    rest = exact.scatter(1, found.rows, -torch.inf).amax(1)
    assert (rest <= found.scores[:, -1] + 1e-4).all()


@pytest.mark.interpret
@pytest.mark.parametrize(("shares", "most_sorted"), [(16, 4096), (2, 0)])
def test_what_reaches_the_bound_is_all_that_is_kept(shares, most_sorted, monkeypatch):
    pytest.importorskip("triton")
    from kernels.top_k._triton import lists, search

    monkeypatch.setattr(search, "_by_groups", None)  # the way out of lists that overflow
    monkeypatch.setattr(lists, "SHARES", shares)  # fewer programs than groups
    monkeypatch.setattr(lists, "MOST_SORTED", most_sorted)  # 0: by torch
    generator = torch.Generator().manual_seed(0)
    items = torch.randn(64 * 64 * 3 + 70, 16, generator=generator).to(DEVICE)
    queries = torch.randn(3, 16, generator=generator).to(DEVICE)
    is_item = (torch.arange(len(items)) % 7 > 0).to(DEVICE)
    for mask in (None, is_item):
        found = top_k(queries, items, 3, is_item_E=mask, impl="triton")
        wanted = top_k(queries, items, 3, is_item_E=mask, impl="reference")
        assert found.rows.tolist() == wanted.rows.tolist()
        torch.testing.assert_close(found.scores, wanted.scores, rtol=1e-5, atol=1e-5)


@pytest.mark.interpret
def test_operator_and_graph():
    queries, items = integers(3, 16, 3, 0), integers(40, 16, 3, 1)
    for is_item in (None, torch.arange(40, device=DEVICE) % 3 == 0):
        torch.library.opcheck(torch.ops.gr.top_k.default, (queries, items, 5, is_item))

        def find(queries, is_item=is_item):
            return top_k(queries, items, 5, is_item_E=is_item, impl="triton").rows + 1

        compiled = torch.compile(find, fullgraph=True, backend="aot_eager")
        assert compiled(queries).tolist() == find(queries).tolist()


@pytest.mark.parametrize("impl", IMPLS)
def test_no_queries_and_no_items(impl):
    empty = torch.zeros(0, 8, device=DEVICE)
    found = top_k(empty, torch.ones(9, 8, device=DEVICE), 3, impl=impl)
    assert found.rows.shape == found.scores.shape == (0, 3)
    found = top_k(torch.ones(2, 8, device=DEVICE), empty, 3, impl=impl)
    assert found.rows.tolist() == [[-1] * 3] * 2
    assert (found.scores == -torch.inf).all()


def test_a_catalogue_of_several_chunks(monkeypatch):
    from kernels.top_k import reference

    monkeypatch.setattr(reference, "CHUNK_SCORES", 64)
    check(integers(4, 6, 1, 0), integers(501, 6, 1, 1), 17)
    check(integers(4, 6, 1, 0).double(), integers(501, 6, 1, 1).double(), 17)


@pytest.mark.gpu
def test_both_steps_round_alike():
    # Of ten million real numbers, equal bits: else an item would be missed where groups are close.
    items = torch.randn(1_000_003, 128, device="cuda", dtype=torch.bfloat16)
    queries = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16)
    found = top_k(queries, items, 200)
    whole = top_k(queries, items, 200, impl="reference")
    assert (found.scores - whole.scores).abs().max() < 1e-4
    same = (found.rows == whole.rows).float().mean()
    assert same > 0.99


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries_QD": torch.zeros(2, 3)}, r"items \(E, D\), got"),
        ({"queries_QD": torch.zeros(2, 4).half()}, "bring the queries to what the items are"),
        ({"k": 0}, "k must be at least 1"),
        ({"is_item_E": torch.ones(4, dtype=torch.bool)}, "is_item must be"),
        ({"is_item_E": torch.ones(5)}, "is_item must be"),
    ],
)
def test_wrong_input(change, message):
    arguments = {"queries_QD": torch.zeros(2, 4), "items_ED": torch.zeros(5, 4), "k": 1} | change
    with pytest.raises(ValueError, match=message):
        top_k(**arguments)


@pytest.mark.interpret
def test_what_the_kernel_does_not_take():
    x = torch.zeros(2, 513, device=DEVICE)
    with pytest.raises(ValueError, match=r"vectors of 1 \.\. 512"):
        top_k(x, x, 1, impl="triton")
    with pytest.raises(ValueError, match="impl='reference'"):
        top_k(x.double(), x.double(), 1, impl="triton")
