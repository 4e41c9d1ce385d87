"""What the Hopper kernels read of the bias, and how the sums of its gradients end, in plain torch.

Under the interpreter: the kernels before and after the main ones are Triton's.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from kernels.hstu_attention import AttentionMask, RelativeBias
from kernels.hstu_attention._hopper.bias import SPAN, TIME_LIMIT, bias_inputs
from kernels.hstu_attention._hopper.bias_gradient import bias_gradients, table_gradients
from kernels.hstu_attention.structure import structure_of
from tests.kernels.hstu_attention_oracle import offsets_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def structure(lengths, q_lengths, query_time, key_time, reach, buckets=20):
    torch.manual_seed(0)
    tables = (torch.randn(n, device=DEVICE) for n in (2 * reach + 1, buckets + 1))
    bias = RelativeBias(*tables, query_time.to(DEVICE), key_time.to(DEVICE))
    return structure_of(
        *(offsets_of(lengths, DEVICE), offsets_of(q_lengths, DEVICE), None, bias),
        AttentionMask(),
        max_len=max(lengths),
        max_q_len=max(q_lengths),
        alpha=1.0,
        scaling_length=8.0,
        softmax=False,
        hopper=True,
        deterministic=False,
    )


@pytest.mark.interpret
@settings(max_examples=12, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 150), st.floats(0, 1)), min_size=1, max_size=3),
    in_order=st.booleans(),
    largest=st.sampled_from([5, 10**6, 2**33]),
    seed=st.integers(0, 99),
)
def test_times_are_bounded(sizes, in_order, largest, seed):
    """Relative times, the spans of each 64 rows, and how near a row is to a key that it sees."""
    lengths = [n for n, _ in sizes]
    q_lengths = [round(n * share) for n, share in sizes]
    draw = torch.Generator().manual_seed(seed)
    keys = [torch.randint(0, largest, (n,), generator=draw) for n in lengths]
    if in_order:
        keys = [x.sort().values for x in keys]
    queries = [x[len(x) - n :] + 3 for x, n in zip(keys, q_lengths, strict=True)]
    call = structure(lengths, q_lengths, torch.cat(queries), torch.cat(keys), reach=7)
    got = bias_inputs(call)
    for b, (key, query) in enumerate(zip(keys, queries, strict=True)):
        key, query = ((x - key[-1]).clamp(-TIME_LIMIT, TIME_LIMIT) for x in (key, query))
        for x, offsets, times, spans in (
            (key, call.offsets, got.key_time, got.key_span),
            (query, call.q_offsets, got.query_time, got.query_span),
        ):
            start = int(offsets[b])
            assert torch.equal(times[start : start + len(x)].cpu().long(), x)
            for i, rows in enumerate(x.split(SPAN) if len(x) else ()):
                at = 2 * (start // SPAN + b + i)
                assert spans[at : at + 2].tolist() == [int(rows.min()), int(rows.max())]
        row = torch.arange(len(query))[:, None] + len(key) - len(query)
        gap = (query[:, None] - key[None]).abs()[torch.arange(len(key))[None] <= row]
        nearest = int(gap.min()) if len(query) else TIME_LIMIT
        assert 0 <= int(got.closest[b]) <= nearest
        if in_order:
            assert int(got.closest[b]) == nearest


@pytest.mark.interpret
@pytest.mark.parametrize("reach", [0, 300, 2000])
def test_position_table_is_spread_and_its_gradient_gathered(reach):
    """One is the transpose of the other, but for the factors: 1/2, and scale / 2."""
    call = structure([100], [100], torch.zeros(100).long(), torch.zeros(100).long(), reach)
    half = bias_inputs(call).position
    farthest = 100 + 256
    everywhere = half._base if half._base is not None else half
    assert everywhere.numel() == 2 * farthest + 1
    assert half.data_ptr() == everywhere[farthest:].data_ptr()
    distance = torch.arange(-farthest, farthest + 1, device=DEVICE)
    entry = distance.clamp(-reach, reach) + reach
    assert torch.equal(everywhere, 0.5 * call.position_table[entry])

    sums = bias_gradients(call)
    filled = torch.randn(2 * farthest + 1, device=DEVICE)
    sums.position._base.copy_(filled)
    sums.time.normal_()
    dposition, dtime = table_gradients(sums, call)
    expected = torch.zeros(2 * reach + 1, device=DEVICE, dtype=torch.float64)
    expected.index_put_((entry,), filled.double(), accumulate=True)
    torch.testing.assert_close(dposition.double(), expected / 16, rtol=1e-5, atol=1e-5)
    wanted = sums.time.double().sum(0) / 16
    torch.testing.assert_close(dtime.double(), wanted, rtol=1e-5, atol=1e-5)
