"""Which implementation runs, by device and by what the caller asked for."""

import subprocess
import sys

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


def test_references_need_no_triton():
    code = (
        "import importlib, pkgutil, sys, torch, kernels\n"
        "operators = [m.name for m in pkgutil.iter_modules(kernels.__path__) if m.ispkg]\n"
        "for name in operators:\n"
        "    name == '_triton' or importlib.import_module(f'kernels.{name}')\n"
        "assert len(operators) > 9, operators\n"
        "kernels.layer_norm.layer_norm(torch.ones(2, 2), impl='reference')\n"
        "x, offsets = torch.ones(2, 1, 4), torch.tensor([0, 2])\n"
        "kernels.hstu_attention.hstu_attention(\n"
        "    x, x, x, offsets, max_len=2, alpha=1.0, scaling_length=2, impl='reference'\n"
        ")\n"
        "assert 'triton' not in sys.modules\n"
        "assert not any(n.startswith('kernels') and '_triton' in n for n in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
