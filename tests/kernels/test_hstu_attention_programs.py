"""Where each program of the Hopper kernels works."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.hstu_attention._hopper.prepare import Programs, prepare


@pytest.mark.interpret
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 127, 128, 129, 256]) | st.integers(0, 700), max_size=6),
    heads=st.integers(1, 3),
    more=st.integers(0, 200),
    slack=st.integers(0, 300),
)
def test_each_block_has_one_program(lengths, heads, more, slack, device):
    """And the first of them are of the longest sequence, head by head."""
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
    rows, longest = sum(lengths) + more, max(lengths, default=0) + slack
    programs = Programs(offsets, rows, longest, 128, heads)
    order, placed, _ = prepare(offsets, programs=programs)
    order, placed = order.tolist(), placed.tolist()
    assert sorted(order) == list(range(len(lengths)))
    assert len(placed) == programs.count
    expected = [[b, place] for b in order for place in range(heads * math.ceil(lengths[b] / 128))]
    assert placed[: len(expected)] == expected
    for b, place in placed[len(expected) :]:
        assert place >= heads * math.ceil(lengths[b] / 128)
    assert [lengths[b] for b in order] == sorted(lengths, reverse=True)
