"""The products of a layer, each on the implementation that its options and tensors allow."""

import torch
from torch import Tensor

from kernels.dispatch import is_hopper
from kernels.hstu_layer.structure import Options
from kernels.linear.op import why_not_hopper
from kernels.quantize import QuantizedRows
from kernels.rotary.columns import Turn

FEW_ROWS = 256
"""As of kernels/linear/_triton/linear.py, which is not loaded for it."""


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    silu_columns: int,
    keep: bool,
    options: Options,
    turns: tuple[Turn | None, Turn | None] = (None, None),
) -> tuple[Tensor, Tensor]:
    """Return y and z (empty unless `keep`) of kernels/linear, in its Hopper kernel if it can.

    Only that turns. Few rows of which nothing is kept go to the other, whose tiles are small; both
    add up in one order, so that a row is the same to the bit whoever shares its batch.
    """
    bias = None if bias is None else bias.contiguous()
    operands = (x, weight.contiguous(), bias, residual, silu_columns, keep)
    found: tuple[Tensor, Tensor]
    is_small = len(x) <= FEW_ROWS and not keep and turns == (None, None)
    if may_use_hopper(x, options) and not (is_small or why_not_hopper(x, weight, residual)):
        from kernels.linear._hopper.forward import linear_fwd as hopper_fwd

        found = hopper_fwd(*operands, turns=turns)
    else:
        from kernels.linear._triton.linear import linear_fwd

        assert turns == (None, None)
        found = linear_fwd(*operands)
    return found


def may_use_hopper(x: Tensor, options: Options) -> bool:
    """Return whether a product of these rows may run on a Hopper kernel."""
    return options.hopper_products and is_hopper(x.device)


def product_fp8(
    x: QuantizedRows,
    weight: QuantizedRows,
    bias: Tensor | None,
    silu_columns: int,
    keep: bool,
    hopper: bool,
    *,
    dtype: torch.dtype,
    turns: tuple[Turn | None, Turn | None],
) -> tuple[Tensor, Tensor]:
    """Return the same in fp8."""
    bias = None if bias is None else bias.contiguous()
    operands = (x.values, weight.values, bias, None, silu_columns, keep)
    scales = (x.scale, weight.scale)
    if hopper:
        from kernels.linear._hopper.forward import linear_fwd as hopper_fwd

        return hopper_fwd(*operands, scales=scales, dtype=dtype, turns=turns)
    from kernels.linear._triton.linear import linear_fwd

    assert turns == (None, None)
    return linear_fwd(*operands, scales=scales, dtype=dtype)
