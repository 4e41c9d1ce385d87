"""Input encoding: the operator, its checks and its gradient."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import Impl, resolve
from kernels.position_time import reference


def position_time(
    x_LD: Tensor,
    position_table_PD: Tensor,
    position_L: Tensor,
    time_table_TD: Tensor | None = None,
    time_L: Tensor | None = None,
    *,
    scale: float = 1.0,
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """Return scale * x + position_table[position] + time_table[time].

    The sum is made in float32. Triton reads the tables in the dtype of x: beside 16-bit tokens
    float32 tables would be most of the traffic; their rounding is no more than that of the result.
    The gradients of the tables are added up in float32 in a fixed order: the same in every run.

    Args:
        x_LD: (L, D) floating, any row stride: the token embeddings.
        position_table_PD: (P, D) floating.
        position_L: (L,) int64 in 0 .. P - 1.
        time_table_TD: (T, D) floating, or None.
        time_L: (L,) int64 in 0 .. T - 1; given with time_table.
        scale: factor of x, for instance sqrt(D).
        impl: which implementation runs.

    Returns:
        (L, D), dtype of x.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit, or an index is outside its table. That
            is looked at on the CPU only; on a GPU, where looking would wait for the device, such an
            index makes its row NaN and has no gradient.

    Source: the input side of DLRM-v3 in generative-recommenders (position and time tables in place
    of the relative bias of 2402.17152); the indices are the caller's here.
    """
    _check(x_LD, position_table_PD, position_L, time_table_TD, time_L)
    arguments = (x_LD, position_table_PD, position_L, time_table_TD, time_L, float(scale))
    if resolve(impl, x_LD) is Impl.REFERENCE:
        return reference.position_time(*arguments)
    _check_triton(x_LD)
    out: Tensor = _forward(*arguments)
    return out


def _check(
    x_LD: Tensor,
    position_table_PD: Tensor,
    position_L: Tensor,
    time_table_TD: Tensor | None,
    time_L: Tensor | None,
) -> None:
    if x_LD.dim() != 2 or x_LD.shape[1] == 0 or not x_LD.is_floating_point():
        raise ValueError(f"x must be (L, D) floating with D > 0, got {_describe(x_LD)}")
    if (time_table_TD is None) != (time_L is None):
        missing = "time_table" if time_table_TD is None else "time"
        raise ValueError(f"time_table and time go together, got no {missing}")
    for name, table, index in (
        ("position", position_table_PD, position_L),
        ("time", time_table_TD, time_L),
    ):
        if table is None or index is None:
            continue
        L, D = x_LD.shape
        if table.dim() != 2 or table.shape[1] != D or not table.is_floating_point():
            raise ValueError(f"{name}_table must be (rows, {D}) floating, got {_describe(table)}")
        if index.shape != (L,) or index.dtype != torch.int64:
            raise ValueError(f"{name} must be ({L},) int64, got {_describe(index)}")
        if table.device != x_LD.device or index.device != x_LD.device:
            raise ValueError(
                f"{name}_table and {name} must be on {x_LD.device} as x is, got {table.device} and "
                f"{index.device}"
            )
        if L == 0 or index.is_cuda or torch.compiler.is_compiling():
            continue
        least, most = int(index.min()), int(index.max())
        if least < 0 or most >= table.shape[0]:
            raise ValueError(
                f"{name} must be in 0 .. {table.shape[0] - 1}, the rows of {name}_table; got "
                f"values from {least} to {most}"
            )


def _check_triton(x_LD: Tensor) -> None:
    from kernels._triton.rows import check_rows

    check_rows("x", x_LD.dtype, x_LD.shape[1])


def _describe(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype}"


@torch.library.custom_op("gr::position_time", mutates_args=())
def _forward(
    x: Tensor,
    position_table: Tensor,
    position: Tensor,
    time_table: Tensor | None,
    time: Tensor | None,
    scale: float,
) -> Tensor:
    from kernels.position_time._triton import cast_tables, position_time_fwd

    position_table, time_table = cast_tables(position_table, time_table, x.dtype)
    return position_time_fwd(
        x if x.stride(1) == 1 else x.contiguous(),
        position_table,
        position.contiguous(),
        time_table,
        None if time is None else time.contiguous(),
        scale,
    )


@_forward.register_fake
def _(
    x: Tensor,
    position_table: Tensor,
    position: Tensor,
    time_table: Tensor | None,
    time: Tensor | None,
    scale: float,
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("gr::sum_by_index", mutates_args=())
def _sum_by_index(rows: Tensor, indices: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    from kernels.position_time._triton import sum_by_index

    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    return sum_by_index(rows, [index.contiguous() for index in indices], list(sizes))


@_sum_by_index.register_fake
def _(rows: Tensor, indices: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    return rows.new_empty(sum(sizes), rows.shape[1], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, position_table, position, time_table, time, scale = inputs
    ctx.save_for_backward(position, time)
    ctx.tables = [
        None if x is None else (x.shape[0], x.dtype) for x in (position_table, time_table)
    ]
    ctx.scale = scale


def _gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    dx = dout if ctx.scale == 1 else dout * ctx.scale
    gradients: list[Tensor | None] = [None, None]
    wanted = [i for i in range(2) if ctx.tables[i] is not None and ctx.needs_input_grad[1 + 2 * i]]
    if wanted:
        sizes, dtypes = zip(*(ctx.tables[i] for i in wanted), strict=True)
        sums = _sum_by_index(dout, [ctx.saved_tensors[i] for i in wanted], sizes).split(sizes)
        for i, table_sums, dtype in zip(wanted, sums, dtypes, strict=True):
            gradients[i] = table_sums.to(dtype)
    return dx, gradients[0], None, gradients[1], None, None


_forward.register_autograd(_gradients, setup_context=_save)
