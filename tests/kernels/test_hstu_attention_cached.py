"""Attention over cached keys, against the attention of the whole sequence in float64."""

from dataclasses import astuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.hstu_attention import AttentionMask, CachedKeys, RelativeBias, hstu_attention
from kernels.hstu_attention.cached import PAGE, hstu_attention_cached
from tests.checks import assert_within_reference_error

START = 1_650_000_000
MASKS = [
    AttentionMask(),
    AttentionMask(num_context=3, context="prefix"),
    AttentionMask(local_window=9),
    AttentionMask(local_window=9, windowed_candidates=True),
    AttentionMask(local_window=0, windowed_candidates=True),
    AttentionMask(num_context=2, context="prefix", local_window=40, global_columns=20),
    AttentionMask(num_context=2, local_window=21, global_columns=5, windowed_candidates=True),
    AttentionMask(local_window=6, global_rows=30),
]


def make_call(cached, events, candidates, mask, bias, softmax, dtype, device, seed=0, dim=0):
    """Return arguments of the operator, and those of the attention of the whole in float64."""
    generator = torch.Generator().manual_seed(seed)
    H, K, V = 2, dim or 16, dim or 32
    new = [e + c for e, c in zip(events, candidates, strict=True)]
    lengths = [n + r for n, r in zip(cached, new, strict=True)]
    offsets, whole = (
        torch.tensor([0, *torch.tensor(x).cumsum(0).tolist()]) for x in (new, lengths)
    )
    total = sum(lengths)
    q, k, v = (torch.randn(total, H, d, generator=generator).to(dtype) for d in (K, K, V))
    time = START + torch.randint(0, 90_000, (total,), generator=generator).sort().values
    is_new = torch.cat([torch.arange(n) >= c for n, c in zip(lengths, cached, strict=True)])
    # Pages in any order, with NaN wherever no token lies.
    pages = [-(-n // PAGE) for n in cached]
    order = torch.randperm(sum(pages) + 2, generator=generator)[: sum(pages)].int()
    table = torch.zeros(len(cached), max(*pages, 1), dtype=torch.int32)
    rows = (sum(pages) + 2) * PAGE
    cached_k, cached_v = (torch.full((rows, H, d), torch.nan, dtype=dtype) for d in (K, V))
    cached_time = torch.zeros(rows, dtype=torch.int64)
    first = 0
    for b, n in enumerate(cached):
        mine = order[first : first + pages[b]]
        first += pages[b]
        table[b, : pages[b]] = mine
        token = torch.arange(n)
        row = mine[token // PAGE].long() * PAGE + token % PAGE
        source = whole[b] + token
        cached_k[row], cached_v[row], cached_time[row] = k[source], v[source], time[source]
    tables = torch.randn(21, generator=generator), torch.randn(31, generator=generator)
    query_time = time + 5
    relative = whole_bias = None
    if bias == "position":
        relative = RelativeBias(tables[0].to(device))
        whole_bias = RelativeBias(tables[0].double())
    if bias == "position_time":
        relative = RelativeBias(
            *(x.to(device) for x in (*tables, query_time[is_new], time[is_new]))
        )
        whole_bias = RelativeBias(tables[0].double(), tables[1].double(), query_time[is_new], time)
    activation = "softmax" if softmax else "silu"
    options = {
        "alpha": 0.3,
        "scaling_length": None if softmax else 17.0,
        "activation": activation,
        "mask": mask,
    }
    counts = torch.tensor(candidates)
    keys = CachedKeys(
        *(x.to(device) for x in (cached_k, cached_v)),
        cached_time.to(device) if bias == "position_time" else None,
        table.to(device),
        torch.tensor(cached).to(device),
        max(cached),
    )
    mine = [x[is_new].to(device) for x in (q, k, v)]
    call = (
        (*mine, offsets.to(device), keys),
        {
            "max_len": max(new),
            "num_candidates": counts.to(device),
            "bias": relative,
            **options,
        },
    )
    whole_call = (
        (q[is_new].double(), k.double(), v.double(), whole),
        {
            "max_len": max(lengths),
            "q_offsets": offsets,
            "max_q_len": max(new),
            "num_candidates": counts,
            "bias": whole_bias,
            "impl": "reference",
            **options,
        },
    )
    return call, whole_call


CALLS = st.lists(
    st.tuples(
        st.sampled_from([0, 5, 40, 127, 128, 129, 300]), st.integers(0, 40), st.integers(0, 40)
    ),
    min_size=1,
    max_size=3,
)


def check(call, dtype, device, impl, dim=0):
    lengths, mask, bias, softmax, seed = call
    if mask.num_context:  # the context is cached, or nothing is
        lengths = [(max(n, 3), e, c) for n, e, c in lengths]
    lengths = [(n, e, c + (e + c == 0)) for n, e, c in lengths]
    made, whole = make_call(
        *zip(*lengths, strict=True), mask, bias, softmax, dtype, device, seed, dim
    )
    got = hstu_attention_cached(*made[0], **made[1], impl=impl)
    expected = hstu_attention(*whole[0], **whole[1])
    if impl == "reference":
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
        return
    same_dtype = hstu_attention_cached(*made[0], **made[1], impl="reference")
    # Terms cancel, and a call may have one row: by the sum of their magnitudes, about.
    q, k, v, offsets = whole[0]
    scale = hstu_attention(q, k, v.abs(), offsets, **whole[1]).abs().max().item()
    assert_within_reference_error(got.cpu(), same_dtype.cpu(), expected, scale=scale)


DRAWN = st.tuples(
    CALLS,
    st.sampled_from(MASKS),
    st.sampled_from(["none", "position", "position_time"]),
    st.booleans(),
    st.integers(0, 99),
)


@settings(deadline=None, max_examples=40)
@given(DRAWN)
def test_reference(call):
    check(call, torch.float32, "cpu", "reference")


@pytest.mark.interpret
@pytest.mark.parametrize("seed", range(len(MASKS)))
def test_triton(seed, device):
    mask, bias = MASKS[seed], ("none", "position", "position_time")[seed % 3]
    lengths = [(140, 18, 5), (5, 0, 33)][: 1 + seed % 2]
    on_gpu = device == "cuda"
    dtypes = [torch.float32, torch.float16] + [torch.bfloat16] * on_gpu
    check((lengths, mask, bias, seed >= 3, seed), dtypes[seed % len(dtypes)], device, "triton")


@pytest.mark.interpret
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_operator_and_graph(impl, device):
    made, _ = make_call(
        [20, 5], [3, 0], [2, 4], MASKS[1], "position_time", False, torch.float32, device
    )
    (q, k, v, offsets, cached), options = made
    bias = options["bias"]
    flat = (*cached, options["num_candidates"], bias.position_table, bias.time_table)
    flat += (bias.query_time, bias.key_time, options["max_len"])
    flat += (0.3, 17.0, "silu", *astuple(MASKS[1]), "" if impl == "triton" else impl)
    arguments = (q, k, v, offsets, *flat)
    torch.library.opcheck(torch.ops.gr.hstu_attention_cached.default, arguments)

    def attend(q):
        return hstu_attention_cached(q, k, v, offsets, cached, **options, impl=impl) * 2

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), attend(q), rtol=0, atol=0)


@pytest.mark.gpu
@settings(deadline=None, max_examples=40)
@given(
    CALLS,
    st.sampled_from(  # each is compiled
        [
            (MASKS[0], "none", False, torch.bfloat16),
            (MASKS[1], "position_time", False, torch.float16),
            (MASKS[3], "none", True, torch.bfloat16),
            (MASKS[6], "position", False, torch.float32),
        ]
    ),
    st.integers(0, 99),
)
def test_triton_of_drawn_calls(lengths, kind, seed):
    mask, bias, softmax, dtype = kind
    check((lengths, mask, bias, softmax, seed), dtype, "cuda", "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [20, 24])
def test_rows_that_begin_anywhere(dim):
    lengths = [(300, 5, 40), (129, 0, 3)]
    check((lengths, MASKS[0], "none", False, 1), torch.bfloat16, "cuda", "triton", dim=dim)


@pytest.mark.gpu
def test_long_histories():
    lengths = [(8_000, 0, 1_000), (3_001, 33, 64)]
    window = AttentionMask(local_window=500, windowed_candidates=True)
    for mask, softmax in ((AttentionMask(), False), (window, False), (AttentionMask(), True)):
        check((lengths, mask, "none", softmax, 1), torch.bfloat16, "cuda", "triton")


def test_wrong_calls_say_what_is_wrong():
    made, _ = make_call(
        [5], [1], [2], AttentionMask(), "position_time", False, torch.float32, "cpu"
    )
    arguments, options = made
    keys = arguments[4]
    for changed, message in (
        (keys._replace(k=keys.k[:-1]), "multiple of 128"),
        (keys._replace(v=keys.v.double()), "cached.v must be"),
        (keys._replace(time=None), "needs cached.time"),
        (keys._replace(lengths=keys.lengths[:0]), "of the 1 sequences"),
        (keys._replace(max_len=10_000), "too few"),
    ):
        with pytest.raises(ValueError, match=message):
            hstu_attention_cached(*arguments[:4], changed, **options)


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("columns", [0, 2])
def test_windowed_candidates_see_what_a_row_of_history_would(window, columns):
    from kernels.hstu_attention.mask import num_visible, visible

    mask = AttentionMask(
        num_context=1, local_window=window, global_columns=columns, windowed_candidates=True
    )
    plain = AttentionMask(num_context=1, local_window=window, global_columns=columns)
    for history in range(1, 8):
        for candidates in range(1, 4):
            length = history + candidates
            row, col = torch.arange(length)[:, None], torch.arange(length)[None]
            args = torch.tensor(length), torch.tensor(candidates)
            seen = visible(row, col, *args, mask)
            # As the event after the history, of a sequence that ends with it.
            one = visible(
                torch.tensor(history), torch.arange(history + 1), torch.tensor(history + 1),
                torch.tensor(0), plain,
            )  # fmt: skip
            for i in range(history, length):
                assert seen[i, :history].tolist() == one[:history].tolist()
                assert seen[i, history:].nonzero().flatten().tolist() == [i - history]
            assert num_visible(row[:, 0], *args, mask).tolist() == seen.sum(1).tolist()
