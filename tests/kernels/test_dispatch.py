"""Which implementation runs, by device and by what the caller asked for."""

import pytest
import torch

from kernels import dispatch
from kernels.dispatch import Impl, resolve

INTERPRETED = "TRITON_INTERPRET"


class OnGpu:
    """Looks like a CUDA tensor."""

    is_cuda = True
    device = torch.device("cuda", 0)


@pytest.fixture
def capability(monkeypatch):
    """Set the compute capability that devices seem to have."""

    def pretend(value):
        dispatch.is_hopper.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: value)

    yield pretend
    dispatch.is_hopper.cache_clear()


def test_auto_takes_the_fastest_that_runs(capability, monkeypatch):
    monkeypatch.delenv(INTERPRETED, raising=False)
    assert resolve("auto", torch.zeros(1)) is Impl.REFERENCE
    capability((9, 0))
    assert resolve("auto", OnGpu()) is Impl.TRITON
    assert resolve("auto", OnGpu(), not_hopper="") is Impl.HOPPER
    assert resolve("auto", OnGpu(), not_hopper="float32") is Impl.TRITON
    capability((8, 0))
    assert resolve("auto", OnGpu(), not_hopper="") is Impl.TRITON
    monkeypatch.setenv(INTERPRETED, "1")
    assert resolve("auto", torch.zeros(1), not_hopper="") is Impl.TRITON


def test_what_cannot_run_is_refused_with_the_reason(capability, monkeypatch):
    monkeypatch.delenv(INTERPRETED, raising=False)
    with pytest.raises(ValueError, match=r"needs CUDA tensors .* got cpu"):
        resolve("triton", torch.zeros(1))
    with pytest.raises(ValueError, match=r"compute capability 9\.0, got cpu"):
        resolve("hopper", torch.zeros(1), not_hopper="")
    capability((9, 0))
    assert resolve("hopper", OnGpu(), not_hopper="") is Impl.HOPPER
    with pytest.raises(ValueError, match="cannot run: q is float32; use"):
        resolve("hopper", OnGpu(), not_hopper="q is float32")
    with pytest.raises(ValueError, match="has no Hopper kernel"):
        resolve("hopper", OnGpu())
    with pytest.raises(ValueError, match=r"impl must be one of .*'hopper'.* got 'fast'"):
        resolve("fast", OnGpu())
