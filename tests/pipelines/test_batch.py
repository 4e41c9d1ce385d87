from dataclasses import fields

import pytest
import torch

from pipelines.stream import SessionStream
from tests.pipelines.logs import MODES, make_config
from tests.pipelines.session_log import session, write_log


@pytest.fixture
def batch(tmp_path):
    events = [{"t": t, "item": t, "click": True, "watch": 1.0, "seen": 2.0} for t in range(5)]
    write_log(tmp_path, [[session(1, 0, events[:2]), session(1, 1, events[2:])]])
    (batch,) = SessionStream(make_config(tmp_path, *MODES[1]), seed=0)
    return batch


def tensors(batch):
    """Yield (name, tensor) of everything in a batch."""
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            yield field.name, value
        elif isinstance(value, dict):
            yield from ((f"{field.name}.{k}", v) for k, v in value.items() if torch.is_tensor(v))
    yield "ids.values", batch.ids.values()
    yield "ids.lengths", batch.ids.lengths()


def test_sizes(batch):
    assert (batch.num_sequences, batch.num_tokens) == (2, 3 + 4 + 3 + 4 + 6)
    assert batch.lengths.tolist() == [7, 13]
    assert batch.ids.length_per_key()[0] == 2 + 5


def test_to_moves_every_tensor(batch):
    moved = batch.to(torch.device("meta"))
    names = [name for name, _ in tensors(batch)]
    assert [name for name, _ in tensors(moved)] == names
    assert len(names) > 18
    assert all(x.device.type == "meta" for _, x in tensors(moved))
    assert all(x.device.type == "cpu" for _, x in tensors(batch))
    assert moved.position == batch.position


def test_to_the_same_device_keeps_the_content(batch):
    for (name, before), (_, after) in zip(
        tensors(batch), tensors(batch.to(torch.device("cpu"))), strict=True
    ):
        torch.testing.assert_close(before, after, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.gpu
def test_pinned_batch_crosses_to_the_gpu(batch):
    pinned = batch.pin_memory()
    assert all(x.is_pinned() for name, x in tensors(pinned) if x.numel())
    there = pinned.to(torch.device("cuda"), non_blocking=True)
    there.record_stream(torch.cuda.current_stream())
    torch.cuda.synchronize()
    for (name, before), (_, after) in zip(tensors(batch), tensors(there), strict=True):
        torch.testing.assert_close(before, after.cpu(), rtol=0, atol=0, equal_nan=True, msg=name)
