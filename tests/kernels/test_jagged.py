from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import jagged
from tests.kernels.evaluate import poisoned_memory

IMPLS = ["reference", pytest.param("triton", marks=pytest.mark.interpret)]
LENGTHS = st.lists(st.integers(0, 9), max_size=6)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def offsets_of(lengths, device=DEVICE):
    return torch.tensor([0, *lengths], device=device).cumsum(0)


def rows_of(x, lengths):
    return list(x.split([int(n) for n in lengths])) if len(lengths) else []


def joined(parts, *likes):
    return torch.cat([*parts, *(x[:0] for x in likes)])


def draw_rows(lengths, shape, dtype=torch.float32, device=DEVICE, seed=0):
    generator = torch.Generator(device).manual_seed(seed)
    size = (sum(lengths), *shape)
    if dtype.is_floating_point:
        return torch.randn(size, generator=generator, device=device).to(dtype)
    return torch.randint(-(2**40), 2**40, size, generator=generator, device=device)


def oracle(name, arguments):
    """The operators by Python lists of slices; lengths instead of offsets."""
    if name == "concat":
        a, a_lengths, b, b_lengths = arguments
        pairs = zip(rows_of(a, a_lengths), rows_of(b, b_lengths), strict=True)
        return (joined([torch.cat(pair) for pair in pairs], a, b),)
    if name == "split":
        x, a_lengths, b_lengths = arguments
        both = rows_of(x, [a + b for a, b in zip(a_lengths, b_lengths, strict=True)])
        heads = [rows[:n] for rows, n in zip(both, a_lengths, strict=True)]
        tails = [rows[n:] for rows, n in zip(both, a_lengths, strict=True)]
        return joined(heads, x), joined(tails, x)
    if name == "newest":
        x, lengths, tails = arguments
        parts = [rows[len(rows) - n :] for rows, n in zip(rows_of(x, lengths), tails, strict=True)]
        return (joined(parts, x),)
    if name == "to_padded":
        x, lengths, max_len, fill = arguments
        out = x.new_full((len(lengths), max_len, *x.shape[1:]), fill)
        for b, rows in enumerate(rows_of(x, lengths)):
            out[b, : len(rows)] = rows[:max_len]
        return (joined([out.flatten(0, 1)], x).view(out.shape),)
    x, lengths = arguments
    zero = x.new_zeros(100, *x.shape[2:])
    parts = [torch.cat([x[b], zero])[:n] for b, n in enumerate(lengths)]
    return (joined(parts, x.flatten(0, 1)),)


def run(name, arguments, impl):
    if name == "concat":
        a, a_lengths, b, b_lengths = arguments
        return (jagged.concat(a, offsets_of(a_lengths), b, offsets_of(b_lengths), impl=impl),)
    if name == "split":
        x, a_lengths, b_lengths = arguments
        return jagged.split(
            x, offsets_of(a_lengths), offsets_of(b_lengths), num_a=sum(a_lengths), impl=impl
        )
    if name == "newest":
        x, lengths, tails = arguments
        return (
            jagged.newest(
                x, offsets_of(lengths), offsets_of(tails), num_rows=sum(tails), impl=impl
            ),
        )
    if name == "to_padded":
        x, lengths, max_len, fill = arguments
        return (jagged.to_padded(x, offsets_of(lengths), max_len=max_len, fill=fill, impl=impl),)
    x, lengths = arguments
    return (jagged.from_padded(x, offsets_of(lengths), num_rows=sum(lengths), impl=impl),)


def make(name, first, second, shape, dtype, seed=0):
    """Arguments of an operator from two lists of lengths."""
    n = min(len(first), len(second))
    first, second = first[:n], second[:n]
    draw = partial(draw_rows, shape=shape, dtype=dtype, seed=seed)
    if name == "concat":
        return draw(first), first, draw(second), second
    if name == "split":
        return draw([a + b for a, b in zip(first, second, strict=True)]), first, second
    if name == "newest":
        return draw(first), first, [min(a, b) for a, b in zip(first, second, strict=True)]
    if name == "to_padded":
        return draw(first), first, max(second, default=3), -2.0
    max_len = max(second, default=3)
    return draw([max_len] * n).view(n, max_len, *shape), first


def check(name, arguments, impl):
    leaves = [
        x.clone().requires_grad_(x.is_floating_point()) if isinstance(x, torch.Tensor) else x
        for x in arguments
    ]
    expected = oracle(name, leaves)
    with poisoned_memory(torch.device(DEVICE)):
        found = run(name, leaves, impl)
    for actual, exact in zip(found, expected, strict=True):
        assert actual.shape == exact.shape
        assert actual.dtype == exact.dtype
        assert torch.equal(actual, exact)
    wanted = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
    if wanted and any(out.requires_grad for out in found):
        douts = [draw_rows([1], out.shape, out.dtype, seed=9)[0] for out in expected]
        gradients = [
            torch.autograd.grad(outs, wanted, douts, materialize_grads=True)
            for outs in (found, expected)
        ]
        for actual, exact in zip(*gradients, strict=True):
            assert torch.equal(actual, exact)


NAMES = ["concat", "split", "newest", "to_padded", "from_padded"]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=15)
@given(
    first=LENGTHS,
    second=LENGTHS,
    shape=st.sampled_from([(), (1,), (5,), (2, 3), (40,)]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.int64]),
)
def test_equals_python_lists(name, impl, first, second, shape, dtype):
    check(name, make(name, first, second, shape, dtype), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("first", "second"),
    [([], []), ([0, 0], [0, 0]), ([300], [270]), ([0, 257, 1, 0], [3, 256, 0, 0])],
    ids=str,
)
def test_edges(name, impl, first, second):
    check(name, make(name, first, second, (3,), torch.float32), impl)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int32, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(512,), (1500,), ()], ids=str)
def test_many_sequences(name, dtype, shape):
    lengths = torch.randint(0, 300, (2, 500), generator=torch.Generator().manual_seed(0)).tolist()
    arguments = make(name, *lengths, shape, torch.float32)
    converted = [x.to(dtype) if isinstance(x, torch.Tensor) else x for x in arguments]
    check(name, converted, "triton")


@pytest.mark.interpret
def test_strided_rows(device):
    wide = draw_rows([7], (12,), device=device)
    arguments = (wide[:, 3:8], [2, 5], wide[:, 4:9], [3, 4])
    check("concat", arguments, "triton")
    check("newest", (wide.T, [8, 4], [3, 0]), "triton")


@pytest.mark.interpret
def test_offsets_that_point_outside_give_zeros_on_a_device(device):
    # On a GPU offsets are not looked at by the host: no read may leave the tensor.
    from kernels.jagged import _triton, reference

    x = draw_rows([6], (4,), device=device)
    offsets, tails = offsets_of([4, 40], device), offsets_of([2, 3], device)
    found = _triton.gather("newest", 5, offsets, tails, x)
    assert torch.equal(found[:2], x[2:4])
    assert not found[2:].any()
    for gather in (_triton.gather, reference.gather):
        short = gather("concat", 6, *[offsets_of([1, 1], device)] * 2, x, x)
        assert torch.equal(short[:4], x[[0, 0, 1, 1]])
        assert not short[4:].any()


@pytest.mark.interpret
def test_registration(device):
    x = draw_rows([7], (4,), device=device).requires_grad_()
    a, b = offsets_of([2, 0, 5], device), offsets_of([0, 0, 3], device)
    tails = draw_rows([3], (4,), device=device).requires_grad_()
    ops = torch.ops.gr
    for op, arguments in [
        (ops.jagged_concat, (x, a, tails, b)),
        (ops.jagged_split, (x, a - b, b, 4)),
        (ops.jagged_newest, (x, a, b, 3)),
        (ops.jagged_oldest_zero, (tails, a, b, 7)),
        (ops.jagged_to_padded, (x, a, 3, -1.0)),
        (ops.jagged_from_padded, (draw_rows([9], (4,), device=device).requires_grad_(), b, 3, 3)),
    ]:
        torch.library.opcheck(op.default, arguments)


@pytest.mark.gpu
def test_compiles_without_graph_break():
    x = draw_rows([7], (4,))
    a, b = offsets_of([2, 0, 5]), offsets_of([0, 0, 3])
    compiled = torch.compile(partial(jagged.newest, num_rows=3), fullgraph=True)(x, a, b)
    assert torch.equal(compiled, jagged.newest(x, a, b, num_rows=3))


@pytest.mark.gpu
@pytest.mark.xdist_group("large")
def test_more_than_int32_elements():
    rows, D = 2**31 // 1024 + 64, 1024
    x = torch.empty(rows, D, device="cuda", dtype=torch.bfloat16)
    x[-8:] = torch.randn(8, D, device="cuda")
    offsets = torch.tensor([0, 5, rows], device="cuda")
    tails = torch.tensor([0, 2, rows - 20], device="cuda")
    found = jagged.newest(x, offsets, tails, num_rows=rows - 20)
    assert torch.equal(found[-8:], x[-8:])


X, OFFSETS = torch.ones(4, 2), torch.tensor([0, 1, 4])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jagged.concat(X, OFFSETS, X, OFFSETS[:2]), "rise from 0 to 4, got 0 .. 1"),
        (lambda: jagged.concat(X, OFFSETS, X[:1], OFFSETS[:2]), "same sequences, got 2 and 1"),
        (lambda: jagged.concat(X, OFFSETS, X.double(), OFFSETS), "b must have rows as a"),
        (lambda: jagged.concat(X, OFFSETS.int(), X, OFFSETS), r"\(B \+ 1,\) int64"),
        (lambda: jagged.concat(X.bool(), OFFSETS, X.bool(), OFFSETS), "a must have rows"),
        (lambda: jagged.split(X, OFFSETS, OFFSETS * 0, num_a=5), "num_a must be in 0 .. 4"),
        (
            lambda: jagged.split(X, OFFSETS, OFFSETS, num_a=4),
            "b_offsets of x must rise from 0 to 0",
        ),
        (lambda: jagged.newest(X, OFFSETS, OFFSETS, num_rows=3), "tail_offsets of x must rise"),
        (
            lambda: jagged.newest(X, OFFSETS, torch.tensor([0, 2, 3]), num_rows=3),
            "sequence 0 has 1 rows, its tail 2",
        ),
        (lambda: jagged.to_padded(X, OFFSETS, max_len=-1), "max_len must be at least 0"),
        (lambda: jagged.to_padded(X, torch.tensor([0, 5, 4]), max_len=2), "falling in between"),
        (lambda: jagged.from_padded(X, OFFSETS[:2], num_rows=1), r"with B = 1"),
    ],
)
def test_wrong_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
