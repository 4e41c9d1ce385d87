from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from kernels.sampled_softmax import sampled_softmax
from tests.checks import assert_within_reference_error
from tests.kernels.evaluate import outputs_and_gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
T = 0.3


def oracle(query, positive, negative, *, rows, negatives, ids, log_q):
    """Row by row: cross entropy of the positive among the negatives that are other items."""
    losses, row, first = [query[:0, 0] + 0 * (positive.sum() + negative.sum())], 0, 0
    for num_rows, num_negatives in zip(rows, negatives, strict=True):
        for r in range(row, row + num_rows):
            logits = [(query[r] @ positive[r]) / T - (log_q[0][r] if log_q else 0)]
            for n in range(first, first + num_negatives):
                if ids[0][r] != ids[1][n]:
                    logits.append((query[r] @ negative[n]) / T - (log_q[1][n] if log_q else 0))
            target = torch.zeros(1, dtype=torch.long, device=query.device)
            losses.append(functional.cross_entropy(torch.stack(logits)[None], target)[None])
        row, first = row + num_rows, first + num_negatives
    return torch.cat(losses)


def make(rows, negatives, D, dtype, has_log_q=True, catalogue=12, seed=0, device=DEVICE):
    generator = torch.Generator(device).manual_seed(seed)
    R, N = sum(rows), sum(negatives)

    def draw(n):
        x = torch.randn(n, D, generator=generator, device=device)
        return functional.normalize(x, dim=1).to(dtype) * 1.5

    vectors = (draw(R), draw(R), draw(N))
    pick = partial(torch.randint, 0, catalogue, generator=generator, device=device)
    ids = (pick((R,)), pick((N,)))
    log_q = None
    if has_log_q:
        log_q = tuple(-torch.rand(n, generator=generator, device=device) * 3 for n in (R, N))
    dloss = torch.randn(R, generator=generator, device=device)
    return vectors, {"rows": rows, "negatives": negatives, "ids": ids, "log_q": log_q}, dloss


def call(query, positive, negative, *, rows, negatives, ids, log_q, impl):
    def offsets(lengths):
        return torch.tensor([0, *lengths], device=query.device).cumsum(0)

    return sampled_softmax(
        query,
        positive,
        negative,
        offsets(rows),
        offsets(negatives),
        positive_id_R=ids[0],
        negative_id_N=ids[1],
        temperature=T,
        positive_log_q_R=log_q[0] if log_q else None,
        negative_log_q_N=log_q[1] if log_q else None,
        impl=impl,
    )


def largest(x):
    return x.abs().max().item() if x.numel() else 0.0


def check(vectors, structure, dloss):
    got, low = (
        outputs_and_gradients(partial(call, impl=impl, **structure), vectors, dloss)
        for impl in ("triton", "reference")
    )
    run = partial(call, impl="reference", **structure)
    high = outputs_and_gradients(run, [x.double() for x in vectors], dloss.double())
    query, positive, negative = (x.double() for x in vectors)
    most = max(
        (query @ x.T).abs().max().item() if query.numel() * x.numel() else 0.0
        for x in (positive, negative)
    )
    for i, (actual, same, exact) in enumerate(zip(got, low, high, strict=True)):
        assert actual.dtype == same.dtype
        if not actual.numel():
            continue
        if i == 0:
            # A difference of logits: roundings are relative to the largest of them.
            assert_within_reference_error(actual, same, exact, scale=most / T + 3)
        else:
            # Probabilities are exponentials of such differences: a rounding of the exponent is
            # several of the result. The reference's products add up in another order.
            size = exact.abs().max().item()
            assert_within_reference_error(actual, same, exact, times=5.0, scale=size)


@pytest.mark.interpret
@pytest.mark.parametrize("margin", [1.0, 6.0, 20.0])
def test_gradients_of_what_is_known_are_small_and_right(margin):
    """Each of them: AdamW steps by the direction of a gradient, however small it is."""
    vectors, structure, dloss = make([6], [9], 16, torch.float32, has_log_q=False, catalogue=10**6)
    query, _, negative = vectors
    vectors = (query, query * (margin * T / query.square().sum(1, keepdim=True)), negative * 0.1)
    dloss = torch.rand_like(dloss) + 0.5
    got = outputs_and_gradients(partial(call, impl="triton", **structure), vectors, dloss)
    run = partial(call, impl="reference", **structure)
    exact = outputs_and_gradients(run, [x.double() for x in vectors], dloss.double())
    torch.testing.assert_close(got[2].double(), exact[2], rtol=1e-4, atol=0)


GROUPS = [
    ([], []),
    ([0, 0], [0, 3]),
    ([1], [0]),
    ([5, 0, 3, 2], [4, 6, 0, 9]),
    ([70], [130]),
    ([200], [3]),
    ([3] * 20, [5] * 20),
]


@pytest.mark.parametrize("has_log_q", [True, False])
@pytest.mark.parametrize(("rows", "negatives"), [*GROUPS[:4], ([9], [7])], ids=str)
def test_reference_is_cross_entropy_of_other_items(rows, negatives, has_log_q):
    vectors, structure, dloss = make(rows, negatives, 5, torch.float64, has_log_q)
    run = partial(call, impl="reference", **structure)
    found = outputs_and_gradients(run, vectors, dloss.double())
    expected = outputs_and_gradients(partial(oracle, **structure), vectors, dloss.double())
    for actual, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-6, atol=1e-7)


@pytest.mark.interpret
@pytest.mark.parametrize("has_log_q", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "negatives"), GROUPS, ids=str)
def test_triton_within_error_budget(rows, negatives, dtype, has_log_q):
    check(*make(rows, negatives, 24, dtype, has_log_q))


@pytest.mark.interpret
@settings(deadline=None, max_examples=6)
@given(
    groups=st.lists(st.tuples(st.integers(0, 80), st.integers(0, 80)), max_size=4),
    D=st.integers(1, 70),
    catalogue=st.sampled_from([2, 30]),
)
def test_triton_any_groups(groups, D, catalogue):
    rows, negatives = [list(x) for x in zip(*groups, strict=True)] if groups else ([], [])
    check(*make(rows, negatives, D, torch.float32, catalogue=catalogue))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D", [48, 64, 256, 512])
@pytest.mark.parametrize(
    ("rows", "negatives"), [([3000, 0, 57], [128, 40, 2000]), ([20] * 200, [128] * 200)], ids=str
)
def test_large_within_error_budget(rows, negatives, D, dtype):
    check(*make(rows, negatives, D, dtype, catalogue=5000))


@pytest.mark.interpret
@pytest.mark.parametrize("seed", [0, 5])
def test_large_logits_neither_overflow_nor_lose_digits(seed):
    """Logits of thousands: a rounding of one is 5e-4 of its probability."""
    vectors, structure, dloss = make([40, 7], [90, 20], 16, torch.float32, seed=seed)
    check([x * 30 for x in vectors], structure, dloss)


@pytest.mark.interpret
def test_views_of_wider_buffers():
    vectors, structure, dloss = make([9, 4], [20, 3], 64, torch.float32)
    check([vectors[0][:, 8:40], vectors[1][:, 1:33], vectors[2][:, :32]], structure, dloss)
    square, structure, dloss = make([8], [8], 8, torch.float32)
    check([x.T for x in square], structure, dloss)


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, in the interpreter
def test_nan_stays_in_its_group():
    vectors, structure, dloss = make([6, 5, 6], [9, 8, 7], 12, torch.float32)
    run = partial(call, impl="triton", **structure)
    clean = outputs_and_gradients(run, vectors, dloss)
    broken = [x.clone() for x in vectors]
    broken[0][7, 2], broken[2][10, 0] = torch.nan, torch.inf
    found = outputs_and_gradients(run, broken, dloss)
    for actual, expected, (start, end) in zip(
        found, clean, [(6, 11), (6, 11), (6, 11), (9, 17)], strict=True
    ):
        others = [i for i in range(len(expected)) if not start <= i < end]
        assert torch.equal(actual[others], expected[others])


@pytest.mark.interpret
def test_registration():
    vectors, structure, _ = make([5, 3], [4, 6], 12, torch.float32)
    leaves = [x.requires_grad_() for x in vectors]
    offsets = (torch.tensor([0, 5, 8], device=DEVICE), torch.tensor([0, 4, 10], device=DEVICE))
    op = torch.ops.gr.sampled_softmax.default
    for log_q in (structure["log_q"], (None, None)):
        torch.library.opcheck(op, (*leaves, *offsets, *structure["ids"], *log_q, T))


@pytest.mark.gpu
def test_compiles_without_graph_break():
    (query, positive, negative), structure, _ = make([5, 3], [4, 6], 12, torch.float32)
    offsets = (torch.tensor([0, 5, 8], device="cuda"), torch.tensor([0, 4, 10], device="cuda"))
    run = partial(
        sampled_softmax,
        positive_id_R=structure["ids"][0],
        negative_id_N=structure["ids"][1],
        temperature=T,
    )
    compiled = torch.compile(run, fullgraph=True)(query, positive, negative, *offsets)
    torch.testing.assert_close(compiled, run(query, positive, negative, *offsets))


Q, K = torch.ones(3, 2), torch.ones(4, 2)
RIGHT = {
    "query_RD": Q,
    "positive_RD": Q,
    "negative_ND": K,
    "query_offsets": torch.tensor([0, 1, 3]),
    "negative_offsets": torch.tensor([0, 4, 4]),
    "positive_id_R": torch.zeros(3, dtype=torch.long),
    "negative_id_N": torch.ones(4, dtype=torch.long),
    "temperature": 1.0,
}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"query_RD": Q[0]}, r"query must be \(R, D\)"),
        ({"positive_RD": K}, r"positive must be \(3, 2\)"),
        ({"negative_ND": K[:, :1]}, r"negative must be \(N, 2\)"),
        ({"negative_ND": K.double()}, "negative must be torch.float32"),
        ({"query_offsets": torch.tensor([0, 1, 2])}, "query_offsets must rise from 0 to 3"),
        ({"negative_offsets": torch.tensor([0, 5, 4])}, "negative_offsets must rise from 0 to 4"),
        ({"negative_offsets": torch.tensor([0, 4])}, "same groups, got 2 and 1"),
        ({"positive_id_R": torch.zeros(3)}, r"positive_id must be \(3,\) int64"),
        ({"negative_id_N": torch.zeros(3, dtype=torch.long)}, r"negative_id must be \(4,\)"),
        ({"negative_log_q_N": torch.zeros(3)}, r"negative_log_q must be \(4,\) floating"),
        ({"temperature": 0.0}, "temperature must be above 0"),
    ],
)
def test_wrong_input(wrong, message):
    assert sampled_softmax(**RIGHT).shape == (3,)
    with pytest.raises(ValueError, match=message):
        sampled_softmax(**{**RIGHT, **wrong})


@pytest.mark.interpret
def test_wrong_input_of_triton():
    wide = {key: torch.ones(x.shape[0], 600) for key, x in list(RIGHT.items())[:3]}
    arguments = {**RIGHT, **wide}
    arguments = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match="at most 512"):
        sampled_softmax(**arguments, impl="triton")
