"""What an output may depend on: its own sequence, and of that the past."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gr.hstu
from gr.sequence import tail_index
from kernels.hstu_attention import AttentionMask, reference
from tests.gr.hstu_oracle import make_info, make_sequences
from tests.gr.test_hstu import DIM, OPTIONS, assert_equal_fp64, make_encoder

RICH = ["paper", "group_rab", "softmax_rab", "dlrm_v3", "rotary_sum"]


@st.composite
def batches(draw):
    """Return (lengths, tails, candidates, num_context); a sequence may be empty."""
    num_context = draw(st.integers(0, 2))
    lengths, tails, candidates = [], [], []
    for _ in range(draw(st.integers(0, 4))):
        length = num_context + draw(st.integers(0, 7)) if draw(st.booleans()) else num_context
        lengths.append(length)
        tails.append(draw(st.integers(0, length)))
        candidates.append(draw(st.integers(0, length - num_context)))
    return lengths, tails, candidates, num_context


def run(encoder, sequences, num_context, x_LD, extra_len=0):
    with torch.no_grad():
        return encoder(x_LD, make_info(sequences, num_context, extra_len))


@settings(deadline=None, max_examples=25)
@given(batches(), st.sampled_from(RICH))
def test_last_layer_equals_computing_all_rows_and_selecting(batch, options):
    lengths, tails, candidates, num_context = batch
    sequences = make_sequences(lengths, tails, candidates)
    info = make_info(sequences, num_context)
    _, encoder = make_encoder(OPTIONS[options], num_layers=1)
    layer = encoder.layers[0]
    x_LD = torch.randn(sum(lengths), DIM, dtype=torch.float64)
    x_tail, x_all = (x_LD.clone().requires_grad_() for _ in range(2))
    rows = tail_index(info)
    assert rows.tolist() == [
        int(info.offsets[b]) + i
        for b, s in enumerate(sequences)
        for i in range(s.length - s.tail, s.length)
    ]

    tail = layer(x_tail, info, tail_R=rows)
    selected = layer(x_all, info)[rows]
    assert_equal_fp64(tail, selected)
    weights = torch.randn(tail.shape, dtype=torch.float64)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    tail_grads = torch.autograd.grad((tail * weights).sum(), [x_tail, *parameters])
    all_grads = torch.autograd.grad((selected * weights).sum(), [x_all, *parameters])
    for _, actual, expected in zip(("x", *names), tail_grads, all_grads, strict=True):
        assert_equal_fp64(actual, expected)


@settings(deadline=None, max_examples=25)
@given(batches(), st.sampled_from(RICH), st.integers(0, 9), st.randoms(use_true_random=False))
def test_batch_mates_padding_and_order_change_nothing(batch, options, extra_len, random):
    lengths, tails, candidates, num_context = batch
    sequences = make_sequences(lengths, tails, candidates)
    _, encoder = make_encoder(OPTIONS[options])
    x = [torch.randn(n, DIM, dtype=torch.float64) for n in lengths]
    alone = [
        run(encoder, [sequence], num_context, rows)
        for sequence, rows in zip(sequences, x, strict=True)
    ]
    order = list(range(len(lengths)))
    random.shuffle(order)
    empty = torch.zeros(0, DIM, dtype=torch.float64)
    together = run(
        encoder,
        [sequences[b] for b in order],
        num_context,
        torch.cat([empty, *(x[b] for b in order)]),
        extra_len,
    )
    assert_equal_fp64(together, torch.cat([empty, *(alone[b] for b in order)]))


def see_everything(row, col, length, num_candidates, mask):
    return (row < length) & (col < length) & (row >= 0) & (col >= 0)


def see_the_next(row, col, length, num_candidates, mask):
    return see_everything(row, col, length, num_candidates, mask) & (col <= row + 1)


def candidates_see_each_other(row, col, length, num_candidates, mask):
    return see_everything(row, col, length, num_candidates, mask) & (col <= row)


def rows_changed_by(encoder, sequence, num_context, changed_tokens):
    """Return the rows whose output changes when tokens get other contents and times."""
    sequence = replace(sequence, tail=sequence.length)
    torch.manual_seed(3)
    before = torch.randn(sequence.length, DIM, dtype=torch.float64)
    after = before.clone()
    moved = replace(
        sequence, timestamps=list(sequence.timestamps), query_times=list(sequence.query_times)
    )
    for token in changed_tokens:
        after[token] += torch.randn(DIM, dtype=torch.float64)
        moved.timestamps[token] += 5_000
        moved.query_times[token] += 5_000
    difference = run(encoder, [sequence], num_context, before)
    difference = (difference - run(encoder, [moved], num_context, after)).abs().amax(1)
    return {row for row in range(sequence.length) if difference[row] > 1e-9}


@pytest.mark.parametrize("leak", [None, see_everything, see_the_next])
@pytest.mark.parametrize("num_context", [0, 2])
@pytest.mark.parametrize("options", RICH)
def test_the_future_changes_no_earlier_row(options, num_context, leak, monkeypatch):
    """A leak is planted as a control: this very test must see it."""
    if leak is not None:
        monkeypatch.setattr(reference, "visible", leak)
    _, encoder = make_encoder(OPTIONS[options])
    (sequence,) = make_sequences([8], [8])
    leaked = set()
    for cut in range(num_context + 1, 8):
        changed = rows_changed_by(encoder, sequence, num_context, range(cut, 8))
        assert set(range(cut, 8)) <= changed
        leaked |= {row for row in changed if row < cut}
    assert bool(leaked) == (leak is not None)


@pytest.mark.parametrize("leak", [None, candidates_see_each_other])
@pytest.mark.parametrize("options", RICH)
def test_a_candidate_changes_itself_only(options, leak, monkeypatch):
    if leak is not None:
        monkeypatch.setattr(reference, "visible", leak)
    _, encoder = make_encoder(OPTIONS[options])
    (sequence,) = make_sequences([8], [8], [3])
    changed = {token: rows_changed_by(encoder, sequence, 1, [token]) for token in (5, 6, 7)}
    only_itself = all(rows == {token} for token, rows in changed.items())
    assert only_itself == (leak is None)


@pytest.mark.parametrize("options", RICH)
def test_equal_candidates_score_equally_wherever_they_stand(options):
    _, encoder = make_encoder(OPTIONS[options])
    (sequence,) = make_sequences([8], [3], [3])
    sequence.query_times[5:] = sequence.timestamps[5:]  # as in a batch
    x_LD = torch.randn(8, DIM, dtype=torch.float64)
    x_LD[6:] = x_LD[5]
    y_RD = run(encoder, [sequence], 0, x_LD)
    assert_equal_fp64(y_RD[1:], y_RD[:1].expand(2, -1))


@pytest.mark.parametrize("leaky", [False, True])
def test_the_context_sees_no_history(leaky, monkeypatch):
    if leaky:
        sees_all = AttentionMask(num_context=2, context="prefix_sees_all")
        monkeypatch.setattr(gr.hstu, "attention_mask", lambda *_: sees_all)
    _, encoder = make_encoder({})
    (sequence,) = make_sequences([6], [6])
    assert rows_changed_by(encoder, sequence, 2, [0]) >= {0, 1, 5}
    assert ({0, 1} & rows_changed_by(encoder, sequence, 2, [5]) != set()) == leaky
