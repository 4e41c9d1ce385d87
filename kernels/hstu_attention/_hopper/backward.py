"""Gradients of q, k, v and of the bias tables: which kernels run, and on what.

Letters: B sequences, L keys, R queries, H heads, K dim of q and k, V dim of v.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.launch import launch
from kernels._triton.sizes import cdiv, next_power_of_2
from kernels.hstu_attention._hopper.backward_kernel import backward_kernel
from kernels.hstu_attention._hopper.bias import bias_inputs
from kernels.hstu_attention._hopper.bias_gradient import (
    BiasGradients,
    bias_gradients,
    table_gradients,
)
from kernels.hstu_attention._hopper.launch import kernel_constants, tiles
from kernels.hstu_attention._hopper.prepare import Programs, Tails, prepare
from kernels.hstu_attention._hopper.query_backward import TAIL, query_gradient
from kernels.hstu_attention._triton.bias_gradient import bias_gradient
from kernels.hstu_attention.structure import Structure

BLOCK_M = 64
BLOCK_N = TAIL.value


@triton.jit(do_not_specialize=["num_rows", "stride"])
def _round_kernel(
    x_ptr, y_ptr, scale, num_rows, stride, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Y (rows of any stride) = x * scale, rounded."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < num_rows)[:, None] & (col < COLUMNS)[None, :]
    x = tl.load(x_ptr + row[:, None] * COLUMNS + col[None, :], mask=inside)
    y = (x * scale).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row[:, None] * stride + col[None, :], y, mask=inside)


def hstu_attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    structure: Structure,
    gradients: tuple[Tensor, Tensor],
    deterministic: bool,
    needs_bias_grad: bool,
    *,
    rounds: bool,
) -> tuple[Tensor, float, Tensor, Tensor]:
    """Write the gradients of k and v; return that of q, its factor, those of the tables. SiLU only.

    Args:
        dout: (R, H, V) contiguous.
        q: as `tiles` takes it, like k and v.
        k: likewise.
        v: likewise.
        structure: as in the forward pass.
        gradients: where dk and dv go; shapes of k and v, strides as `tiles` takes them.
        deterministic: the same bits for the same input.
        needs_bias_grad: else both tables' gradients come back empty.
        rounds: whether dQ comes back rounded, with a factor of 1, and not as sums in float32.
    """
    dk, dv = gradients
    K, H = q.shape[2], q.shape[1]
    programs = Programs(structure.offsets, k.shape[0], structure.max_len, BLOCK_N, H)
    order, placed, (k_tail, v_tail, q_tail, dout_tail) = prepare(
        structure.offsets,
        Tails(k, v, structure.offsets, BLOCK_N),
        Tails(q, dout, structure.q_offsets, BLOCK_M),
        programs=programs,
    )
    dq_sum = dq = q
    wide = max(K, v.shape[2]) > 128
    fused = not (deterministic or wide or K == 32)  # halves of 16 columns are no operands
    if fused:
        dq_sum = torch.zeros(q.shape, device=q.device, dtype=torch.float32)
    if rounds or not fused:
        dq = torch.empty(q.shape, device=q.device, dtype=q.dtype)
    key_scale = 0.5 * structure.alpha * structure.scale
    bias = bias_inputs(structure)
    sums = BiasGradients()
    if needs_bias_grad and not deterministic:
        sums = bias_gradients(structure)
    if programs.count:
        arguments = [
            tiles(q, BLOCK_M), tiles(q_tail, BLOCK_M), tiles(dout, BLOCK_M),
            tiles(dout_tail, BLOCK_M), tiles(k, BLOCK_N), tiles(k_tail, BLOCK_N),
            tiles(v, BLOCK_N), tiles(v_tail, BLOCK_N), tiles(dq_sum, BLOCK_M, K // 2),
            tiles(dk, BLOCK_N // 2), tiles(dv, BLOCK_N // 2),
            dk, dv, dk.stride(0), dv.stride(0),
            placed, structure.offsets, structure.q_offsets, structure.num_candidates,
            *bias, *sums,
            structure.alpha * 0.5, key_scale, structure.scale,
        ]  # fmt: skip
        wanted = [(False, True), (True, False)] if wide else [(True, True)]
        for key_grad, value_grad in wanted:
            constants = {
                **kernel_constants(q, structure),
                "STAGES": 2,
                "DOUT_STAGES": 2 if value_grad else 1,
                "QUERY_GRAD": fused,
                "KEY_GRAD": key_grad,
                "VALUE_GRAD": value_grad,
            }
            launch(backward_kernel, (programs.count, 1, 1), arguments, constants)
    if not fused:
        query_gradient(dout, q, k, v, k_tail, order, structure, bias, dq)
    elif rounds and q.shape[0]:
        columns = H * K
        block_c = min(1024, next_power_of_2(columns))
        rows = 2048 // block_c
        grid = (cdiv(q.shape[0], rows), cdiv(columns, block_c), 1)
        launch(
            _round_kernel,
            grid,
            (dq_sum, dq, key_scale, q.shape[0], dq.stride(0)),
            {"COLUMNS": columns, "ROWS": rows, "BLOCK_C": block_c},
        )
    of_q = (dq, 1.0) if rounds or not fused else (dq_sum, key_scale)
    if not needs_bias_grad:
        return *of_q, q.new_empty(0), q.new_empty(0)
    if deterministic:
        return *of_q, *bias_gradient(dout, q.new_empty(0), q.new_empty(0), q, k, v, structure)
    return *of_q, *table_gradients(sums, structure)
