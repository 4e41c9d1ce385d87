"""The bench of ULTRA-HSTU: what it times is what it says, at sizes of a CPU."""

import pytest
import torch

import gr.bench_encoders
import gr.bench_ultra
from gr.bench_encoders import (
    Shape,
    Stack,
    jagged_lengths,
    median_ms,
    semi_local,
    shortened,
    structure,
    truncation,
)
from gr.bench_ultra import measure_int4, measure_step, table
from tests.gr.hstu_oracle import make_info, make_sequences

SMALL = Shape(dim=16, num_heads=2, num_layers=6, candidates=4, device="cpu")


def test_the_structure_is_that_of_a_batch_of_candidates():
    model = SMALL.hstu(64, **truncation(2, 5))
    found = structure([30, 3, 9], 4, model, "cpu")
    expected = make_info(make_sequences([30, 3, 9], [4, 3, 4], [4, 3, 4]), keep_history=5)
    for name in ("offsets", "tail_offsets", "session_start", "num_candidates"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for name in ("max_len", "max_tail_len", "num_context", "num_rows", "kept"):
        assert getattr(found, name) == getattr(expected, name), name


def test_a_step_learns_and_what_it_saves_is_counted(monkeypatch):
    stack = Stack(SMALL.hstu(64, **semi_local(3, 2)), [40, 7], SMALL)
    before = [p.clone() for p in stack.encoder.parameters()]
    stack.train()
    assert not any(map(torch.equal, before, stack.encoder.parameters()))

    def once(calls, **_):
        return median_ms(calls, rounds=1, warm_up=0)

    monkeypatch.setattr(gr.bench_ultra, "median_ms", once)
    monkeypatch.setattr(gr.bench_encoders, "median_ms", once)
    monkeypatch.setattr(gr.bench_ultra, "KEPT", 16)
    monkeypatch.setattr(gr.bench_ultra, "K1", 8)
    monkeypatch.setattr(gr.bench_ultra, "K2", 8)
    found = measure_step(SMALL)
    assert 1 < found["flop_ratio_ultra_2_full"] < found["flop_ratio_ultra"] < 6
    (row,) = (line for line in table({"step": found}) if line.startswith("| training step"))
    assert f"{found['train_speedup_ultra']:.2f}x" in row


def test_lengths_are_those_of_stochastic_length():
    lengths = jagged_lengths(20_000, 8192)
    assert min(lengths) >= 1
    assert max(lengths) <= 8192
    cut = round(8192**0.8)
    short = shortened(lengths, 8192)
    long = [(n, s) for n, s in zip(lengths, short, strict=True) if n > cut]
    assert {s for n, s in long if s != n} == {cut}
    whole = sum(s == n for n, s in long) / len(long)
    expected = sum(8192**1.6 / n**2 for n, _ in long) / len(long)
    assert whole == pytest.approx(expected, rel=0.1)


def test_rows_in_4_bits_are_a_quarter():
    found = measure_int4(SMALL, num_rows=1000, counts=(64,))
    assert found["bytes_ratio"] == pytest.approx(256 / 68)
    assert found["latency_64"] == pytest.approx(found["ms_int4_64"] / found["ms_float16_64"])
