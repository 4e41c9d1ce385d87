"""Launches of compiled kernels: what is compiled anew, and what the compiled kernel is given."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from triton._C.libtriton import native_specialize_impl
from triton.backends.nvidia.compiler import CUDABackend

from kernels._triton import launch as module
from kernels._triton.launch import Tiles, launch
from kernels._triton.sizes import cdiv, next_power_of_2

DTYPES = (torch.float32, torch.bfloat16, torch.int64)
BUFFER = torch.zeros(64, dtype=torch.int64)


@dataclass
class FakeKernel:
    """What launch needs of a kernel: it is called once for each compilation."""

    arg_names: list[str]
    compiled: list[Any] = field(default_factory=list)
    returns_none: bool = False

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def compile_and_run(*arguments: Any, **options: Any) -> Any:
            self.compiled.append(FakeCompiled(arguments, options))
            return None if self.returns_none else self.compiled[-1]

        return compile_and_run


@dataclass
class FakeCompiled:
    """What Triton returns of a launch."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]
    function: int = 7
    packed_metadata: tuple[int, ...] = (4, 1, 0)
    runs: list[tuple[Any, ...]] = field(default_factory=list)
    watched: list[tuple[Any, ...]] = field(default_factory=list)

    def run(self, *arguments: Any) -> None:
        self.runs.append(arguments)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: self.watched.append(arguments)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        @staticmethod
        def get_current_stream(device: int) -> int:
            return 99

    monkeypatch.setattr(module, "_compiled", {})
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())


def test_the_second_launch_passes_numbers() -> None:
    kernel = FakeKernel(["x", "y", "n", "scale", "BLOCK"])
    for n in (48, 64):
        x = torch.zeros(n)
        launch(kernel, (n, 2, 1), (x, None, n, 0.5), {"BLOCK": 16})
    (compiled,) = kernel.compiled
    assert compiled.options == {"BLOCK": 16, "num_warps": 4}
    assert compiled.arguments[1:] == (None, 48, 0.5)
    assert compiled.runs == [
        (64, 2, 1, 99, 7, (4, 1, 0), None, None, None, x.data_ptr(), None, 64, 0.5, 16)
    ]


def test_a_profiler_is_told_of_every_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = FakeKernel(["x"])
    x = torch.zeros(4)
    monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [print])
    for _ in range(2):
        launch(kernel, (1, 1, 1), (x,), {})
    assert kernel.compiled[0].watched == [(x,)]
    assert not kernel.compiled[0].runs


def test_the_interpreter_is_asked_each_time() -> None:
    kernel = FakeKernel(["x"], returns_none=True)
    for _ in range(2):
        launch(kernel, (1, 1, 1), (torch.zeros(4),), {})
    assert len(kernel.compiled) == 2


def test_tiles_are_described_once() -> None:
    kernel = FakeKernel(["x", "n"])
    for rows in (64, 128):
        x = torch.zeros(rows, 64, dtype=torch.bfloat16)
        tiles = Tiles(x, [rows, 64], [64, 1], [64, 64])
        launch(kernel, (1, 1, 1), (tiles, 3), {})
    (compiled,) = kernel.compiled
    assert compiled.arguments[0].block_shape == [64, 64]
    assert compiled.runs[0][-2:] == (tiles, 3)
    launch(kernel, (1, 1, 1), (tiles._replace(block_shape=[32, 64]), 3), {})
    assert len(kernel.compiled) == 2


def _tensor(dtype: torch.dtype, offset: int) -> torch.Tensor:
    return BUFFER.view(dtype)[offset:]


NUMBERS = st.sampled_from(
    [0, 1, 2, 15, 16, 17, 48, 2**31 - 16, 2**31, 2**31 + 1, -1, -16, -(2**31) - 1]
)
TENSORS = st.builds(_tensor, st.sampled_from(DTYPES), st.integers(0, 8))
PAIRS = st.one_of(
    st.tuples(NUMBERS, NUMBERS),
    st.tuples(TENSORS, TENSORS),
    st.tuples(st.none() | NUMBERS | TENSORS | st.floats(-2, 2), st.none() | NUMBERS | TENSORS),
)


@settings(max_examples=300, deadline=None)
@given(PAIRS, PAIRS)
def test_what_triton_compiles_anew_is_compiled_anew(
    first: tuple[Any, Any], second: tuple[Any, Any]
) -> None:
    """Against Triton's own specialization: calls that share a kernel have the same."""
    kernel = FakeKernel(["a", "b", "BLOCK"])
    made: dict[int, list[Any]] = {}
    module._compiled.clear()
    for arguments in itertools.product(first, second):
        before = [len(compiled.runs) for compiled in kernel.compiled]
        launch(kernel, (1, 1, 1), arguments, {"BLOCK": 1})
        after = [len(compiled.runs) for compiled in kernel.compiled]
        (used,) = [i for i, (a, b) in enumerate(itertools.zip_longest(before, after)) if a != b]
        specialized = [native_specialize_impl(CUDABackend, x, False, True, True) for x in arguments]
        assert made.setdefault(used, specialized) == specialized


@given(st.integers(1, 2**40), st.integers(1, 2**20))
def test_sizes_are_those_of_triton(n: int, block: int) -> None:
    assert cdiv(n, block) == triton.cdiv(n, block)
    assert next_power_of_2(n) == triton.next_power_of_2(n)
