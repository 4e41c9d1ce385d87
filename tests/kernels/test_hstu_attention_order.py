"""The order in which programs take the sequences."""

import gc

import torch

from kernels.hstu_attention._triton import launch
from kernels.hstu_attention._triton.launch import longest_first


def offsets_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def test_the_longest_come_first_whatever_was_sorted_before():
    first = offsets_of([3, 9, 1])
    assert longest_first(first).tolist() == [1, 0, 2]
    assert longest_first(first) is longest_first(first)
    # As many sequences, perhaps where the first stood in memory.
    del first
    gc.collect()
    second = offsets_of([3, 1, 9])
    assert longest_first(second).tolist() == [2, 0, 1]
    second.copy_(offsets_of([9, 1, 3]))
    assert longest_first(second).tolist() == [0, 2, 1]
    assert longest_first(offsets_of([1, 2])).tolist() == [1, 0]


def test_a_graph_sorts_for_itself(monkeypatch):
    offsets = offsets_of([3, 9, 1])
    before = longest_first(offsets)
    monkeypatch.setattr(launch, "is_captured", lambda x: True)
    captured = longest_first(offsets)
    assert captured is not before
    assert longest_first(offsets) is captured
    monkeypatch.undo()
    assert longest_first(offsets) is not captured
