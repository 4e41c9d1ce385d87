"""What the bench.py of an operator provides to `gr bench OP` (gr/bench.py), and what they share."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Mode = Literal["forward", "backward", "both"]
"""Both: what a bench times is a forward and a backward pass in one call."""


class Case(NamedTuple):
    """One shape at which an operator is measured."""

    name: str
    """Shown in tables and records."""
    dtype: torch.dtype
    """Of the inputs."""
    shape: dict[str, int]
    """Letter -> size, for instance L and D."""
    modes: tuple[Mode, ...] = ("forward", "backward")
    """What is measured."""


class OperatorBench(Protocol):
    """The module kernels.OP.bench."""

    CASES: Sequence[Case]

    def variants(self, case: Case, mode: Mode, device: str) -> dict[str, Callable[[], object]]:
        """Return what is timed: "ours" first, then rivals by name. Random inputs, never zeros."""
        ...

    def bytes_moved(self, case: Case, mode: Mode) -> int:
        """Return the fewest bytes: each input read once, each output written once."""
        ...

    def flops(self, case: Case, mode: Mode) -> int:
        """Return the floating-point operations that count; 0 where only bytes matter."""
        ...


def timed(
    op: Callable[..., Tensor], inputs: Sequence[Tensor | None], mode: Mode
) -> Callable[[], object]:
    """Return a call of `op(*inputs)`, or of its backward pass alone for every floating input."""
    if mode == "forward":
        return lambda: op(*inputs)
    leaves = [
        None if x is None else x.detach().requires_grad_(x.is_floating_point()) for x in inputs
    ]
    out = op(*leaves)
    dout = torch.randn_like(out)
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    return lambda: torch.autograd.grad(out, wanted, dout, retain_graph=True)
