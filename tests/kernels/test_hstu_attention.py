import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.hstu_attention import AttentionMask, RelativeBias, hstu_attention
from kernels.hstu_attention.bias import time_bucket
from kernels.hstu_attention.mask import num_visible, visible
from tests.kernels import hstu_attention_oracle as oracle
from tests.kernels.hstu_attention_oracle import Case, offsets_of

MASKS = {
    "causal": AttentionMask(),
    "context": AttentionMask(num_context=2),
    "prefix": AttentionMask(num_context=3, context="prefix"),
    "prefix_sees_all": AttentionMask(num_context=2, context="prefix_sees_all"),
    "window": AttentionMask(local_window=2),
    "window_zero": AttentionMask(local_window=0),
    "global_rows": AttentionMask(local_window=1, global_rows=3),
    "global_columns": AttentionMask(num_context=1, local_window=2, global_columns=2),
    "everything": AttentionMask(
        num_context=2, context="prefix", local_window=3, global_rows=2, global_columns=1
    ),
}


@st.composite
def structures(draw):
    """Lengths, query tails and candidates of a few sequences, empty ones included."""
    lengths = draw(st.lists(st.integers(0, 11), max_size=4))
    tails = [draw(st.integers(0, n)) for n in lengths]
    candidates = [draw(st.integers(0, n)) for n in lengths]
    return lengths, tails, candidates


masks = st.sampled_from(list(MASKS.values()))


def close(actual, expected, rtol):
    for name, x in expected.items():
        torch.testing.assert_close(
            actual[name].double(), x, rtol=rtol, atol=rtol, msg=lambda m, n=name: f"{n}: {m}"
        )


@settings(max_examples=60, deadline=None)
@given(
    structure=structures(),
    mask=masks,
    bias=st.sampled_from(["none", "position", "position_time"]),
    activation=st.sampled_from(["silu", "softmax"]),
    seed=st.integers(0, 2**20),
)
def test_forward_and_gradients_match_the_equations(structure, mask, bias, activation, seed):
    lengths, tails, candidates = structure
    case = Case(lengths, tails, candidates, mask=mask, bias=bias, activation=activation, seed=seed)
    close(case.run("reference", torch.float64), case.oracle(), 1e-10)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("activation", ["silu", "softmax"])
def test_every_mask_with_bias_and_candidates(mask, activation):
    case = Case(
        [9, 0, 12, 1],
        candidates=[2, 0, 4, 1],
        mask=mask,
        bias="position_time",
        activation=activation,
    )
    close(case.run("reference", torch.float64), case.oracle(), 1e-10)


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)]
)
def test_low_precision_computes_in_float32(dtype, rtol):
    case = Case([7, 3], bias="position_time")
    got = case.run("reference", dtype)
    assert got["out"].dtype == dtype
    assert got["position_table"].dtype == dtype
    close(got, case.oracle(dtype), rtol)


def brute_force_visible(length, candidates, mask):
    pairs = itertools.product(range(length), range(length))
    seen = [oracle.sees(r, c, length, candidates, mask) for r, c in pairs]
    return torch.tensor(seen, dtype=torch.bool).view(length, length)


@settings(max_examples=100, deadline=None)
@given(
    length=st.integers(0, 14),
    share=st.floats(0, 1),
    num_context=st.integers(0, 4),
    context=st.sampled_from(["causal", "prefix", "prefix_sees_all"]),
    window=st.none() | st.integers(0, 6),
    rows=st.integers(0, 5),
    columns=st.integers(0, 5),
)
def test_visible_and_its_count(length, share, num_context, context, window, rows, columns):
    mask = AttentionMask(
        num_context=num_context,
        context=context if num_context else "causal",
        local_window=window,
        global_rows=rows if window is not None else 0,
        global_columns=columns if window is not None else 0,
    )
    candidates = int(share * length)
    row = torch.arange(length)
    got = visible(row[:, None], row[None], torch.tensor(length), torch.tensor(candidates), mask)
    expected = brute_force_visible(length, candidates, mask)
    assert torch.equal(got, expected)
    count = num_visible(row, torch.tensor(length), torch.tensor(candidates), mask)
    assert torch.equal(count, expected.sum(1))


def test_what_lies_outside_of_the_sequence_is_hidden():
    row, col = torch.tensor([-1, 0, 3, 2, 2]), torch.tensor([0, -1, 0, 3, 2])
    got = visible(row, col, torch.tensor(3), torch.tensor(0), AttentionMask())
    assert got.tolist() == [False, False, False, False, True]


@settings(max_examples=200, deadline=None)
@given(seconds=st.integers(-(2**62), 2**62) | st.integers(0, 3000), last=st.integers(0, 160))
def test_time_buckets(seconds, last):
    got = time_bucket(torch.tensor(seconds), torch.tensor(0), last)
    assert int(got) == oracle.time_bucket(seconds, 0, last)


@pytest.mark.parametrize("bucket", range(1, 100))
def test_time_buckets_beside_their_thresholds(bucket):
    first = math.ceil(math.exp(0.301 * bucket))
    got = time_bucket(torch.tensor([first - 1, first]), torch.tensor(0), 128)
    assert got.tolist() == [oracle.time_bucket(s, 0, 128) for s in (first - 1, first)]


def test_a_sequence_does_not_depend_on_its_batch_mates():
    mask = MASKS["everything"]
    together = Case([6, 9, 4], candidates=[1, 3, 0], mask=mask, bias="position_time")
    out = together.run("reference", torch.float64)["out"]
    alone = Case([9], candidates=[3], mask=mask, bias="position_time")
    own = slice(6, 15)
    for name in ("q", "k", "v"):
        alone.tensors[name] = together.tensors[name][own]
    for name in ("position_table", "time_table"):
        alone.tensors[name] = together.tensors[name]
    alone.key_time, alone.query_time = together.key_time[own], together.query_time[own]
    torch.testing.assert_close(alone.run("reference", torch.float64)["out"], out[own])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_value_stays_in_its_sequence(bad):
    case = Case([5, 4, 6], bias="position_time")
    for name in ("q", "k", "v"):
        case.tensors[name][5:9] = bad
    case.grad[5:9] = bad
    got = case.run("reference", torch.float32)
    for name in ("out", "q", "k", "v"):
        assert got[name][:5].isfinite().all(), name
        assert got[name][9:].isfinite().all(), name


def test_query_tails_are_the_last_rows():
    case = Case([8, 5, 0], candidates=[2, 1, 0], mask=MASKS["everything"], bias="position_time")
    full = case.run("reference", torch.float64)["out"]
    keep = torch.tensor([5, 6, 7, 12])
    tail = replace(case, q_lengths=[3, 1, 0])
    tail.tensors = {**case.tensors, "q": case.tensors["q"][keep]}
    tail.query_time, tail.key_time = case.query_time[keep], case.key_time
    tail.grad = case.grad[keep]
    torch.testing.assert_close(tail.run("reference", torch.float64)["out"], full[keep])


def test_strided_views_of_one_buffer():
    case = Case([6, 3], qk_dim=4, v_dim=4)
    packed = torch.cat([case.tensors[n].flatten(1) for n in ("v", "q", "k")], dim=1)
    v, q, k = (x.view(9, 2, 4) for x in packed.split(8, dim=1))
    assert not q.is_contiguous()
    out = hstu_attention(q, k, v, offsets_of([6, 3]), max_len=6, alpha=case.alpha, scaling_length=7)
    torch.testing.assert_close(out, case.oracle()["out"])


def call(**changed):
    """Call with one argument spoilt."""
    q = torch.randn(5, 2, 4)
    arguments = {
        "q": q,
        "k": q,
        "v": q,
        "offsets": offsets_of([3, 2]),
        "max_len": 3,
        "alpha": 1.0,
        "scaling_length": 8,
        **changed,
    }
    return hstu_attention(**arguments)


TABLE, TIMES = torch.zeros(5), torch.zeros(5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": torch.zeros(5, 8)}, r"q must be a floating tensor \(tokens, heads, dim\)"),
        ({"k": torch.zeros(5, 2, 4, dtype=torch.int64)}, "k must be a floating tensor"),
        ({"v": torch.zeros(5, 2, 4, dtype=torch.float64)}, "share dtype and device"),
        ({"k": torch.zeros(5, 2, 6)}, "k must have the heads and the dim of q"),
        ({"v": torch.zeros(4, 2, 4)}, "v must have the tokens and the heads of k"),
        ({"offsets": offsets_of([3, 2]).int()}, "offsets must be a 1-D int64 tensor"),
        ({"offsets": torch.zeros(0, dtype=torch.int64)}, "offsets must hold B \\+ 1 values"),
        (
            {"offsets": offsets_of([3, 1])},
            "offsets must begin with 0 and end with .* 5, got 0 and 4",
        ),
        ({"offsets": torch.tensor([0, 6, 5])}, "offsets must not fall, got a step of -1"),
        ({"max_len": 2}, "max_len must be at least the largest step of offsets, 3, got 2"),
        ({"q_offsets": offsets_of([5])}, "q_offsets must hold as many values as offsets"),
        ({"q_offsets": offsets_of([1, 1])}, "q_offsets must begin with 0 and end with"),
        ({"q_offsets": offsets_of([2, 3])}, "q_offsets must give .* got 3 for sequence 1 of 2"),
        ({"max_q_len": 1}, "max_q_len must be at least the largest step of q_offsets, 3, got 1"),
        ({"num_candidates": torch.tensor([1])}, "one value for each of the 2 sequences, got 1"),
        ({"num_candidates": torch.tensor([0, 3])}, "num_candidates must give each .* got 3"),
        ({"num_candidates": torch.tensor([-1, 0])}, "num_candidates must give each .* got -1"),
        ({"scaling_length": 0}, "scaling_length must be above 0"),
        ({"scaling_length": None}, "scaling_length must be above 0"),
        ({"activation": "softmax"}, "scaling_length must be None, got 8"),
        ({"activation": "relu"}, "activation must be 'silu' or 'softmax', got 'relu'"),
        (
            {"bias": RelativeBias(torch.zeros(4))},
            r"position_table must be floating, \(2 \* M - 1,\)",
        ),
        ({"bias": RelativeBias(TABLE, None, TIMES)}, "query_time would be ignored"),
        ({"bias": RelativeBias(TABLE, TABLE, TIMES)}, "time_table needs bias.key_time, got None"),
        ({"bias": RelativeBias(TABLE, TABLE, TIMES[1:], TIMES)}, "query_time must be int64, .5,."),
        ({"bias": RelativeBias(TABLE, TABLE[None], TIMES, TIMES)}, "time_table must be floating"),
        ({"impl": "cuda"}, "impl must be one of"),
        ({"impl": "triton"}, "impl='triton'"),
    ],
)
def test_wrong_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        call(**changed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_context": -1}, "num_context must be at least 0, got -1"),
        ({"local_window": -1}, r"local_window \(K1\) must be at least 0"),
        ({"context": "all", "num_context": 1}, "context must be"),
        ({"context": "prefix"}, "needs num_context > 0"),
        ({"global_rows": 3}, "except something from local_window"),
    ],
)
def test_wrong_masks_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AttentionMask(**options)
