"""4-bit rows to floating rows: the operator and its checks."""

import torch
from torch import Tensor

from kernels.dispatch import Impl, resolve
from kernels.int4_rows import reference
from kernels.int4_rows.reference import CONSTANTS

MAX_DIM = 8192
"""Widest row that the kernel holds."""


def dequantize_int4(
    rows_EW: Tensor,
    index_R: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """Return 4-bit rows as floating rows: value * scale + bias. Not differentiable.

    A row of W = D / 2 + 4 bytes: D / 2 bytes of values 0 .. 15, the even column in the low half of
    a byte; float16 scale; float16 bias. Computed in float32, rounded once to `dtype`.

    Args:
        rows_EW: (E, W) uint8, contiguous. With an index on a GPU it may lie in page-locked host
            memory: each row is read over the bus, as it is, once.
        index_R: (R,) int64, rows that are wanted, in any order, with repetition; None: all. On a
            GPU a number outside 0 .. E - 1 gives a row of NaN; elsewhere it is an IndexError.
        dtype: of the result: float32, float16 or bfloat16.
        impl: which implementation runs. The reference takes rows and index on one device.

    Returns:
        (R, D) or (E, D), on the device of the index, or of the rows without one.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit, or D is above 8192 (Triton).

    Source: row format of FBGEMM's FloatToFusedNBitRowwiseQuantizedSBHalf with bit_rate = 4.
    """
    if rows_EW.dim() != 2 or rows_EW.dtype != torch.uint8 or not rows_EW.is_contiguous():
        raise ValueError(
            f"rows must be (E, W) uint8, contiguous, got {tuple(rows_EW.shape)} {rows_EW.dtype}"
        )
    width = rows_EW.shape[1]
    if width <= CONSTANTS or width % 2:
        raise ValueError(
            f"rows must have D / 2 + {CONSTANTS} bytes for D a multiple of 4, got {width}"
        )
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    if index_R is not None and (index_R.dim() != 1 or index_R.dtype != torch.int64):
        raise ValueError(f"index must be (R,) int64, got {tuple(index_R.shape)} {index_R.dtype}")
    like = rows_EW if index_R is None else index_R
    implementation = resolve(impl, like)
    apart = like.device != rows_EW.device
    if apart and (implementation is Impl.REFERENCE or not rows_EW.is_pinned()):
        raise ValueError(
            f"rows are on {rows_EW.device}, index on {like.device}: bring them together, or pin "
            "the rows (rows.pin_memory()) for a GPU to read them with impl='triton'"
        )
    if implementation is Impl.REFERENCE:
        chosen = rows_EW if index_R is None else rows_EW.index_select(0, index_R)
        return reference.dequantize_int4(chosen, dtype)
    if 2 * (width - CONSTANTS) > MAX_DIM:
        raise ValueError(
            f"rows of {2 * (width - CONSTANTS)} values are wider than {MAX_DIM}, which "
            "impl='triton' holds: use impl='reference'"
        )
    run = _operator if torch.compiler.is_compiling() else _dequantize
    out: Tensor = run(rows_EW, None if index_R is None else index_R.contiguous(), dtype)
    return out


def _dequantize(rows: Tensor, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    # Loaded when used: the reference works without Triton.
    from kernels.int4_rows import _triton

    return _triton.dequantize_int4(rows, index, dtype)


# For compiled graphs; eager calls go without it, which takes 0.2 ms of a processor a call.
_operator = torch.library.custom_op("gr::dequantize_int4", _dequantize, mutates_args=())


@_operator.register_fake
def _(rows: Tensor, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    like = rows if index is None else index
    return like.new_empty((len(like), 2 * (rows.shape[1] - CONSTANTS)), dtype=dtype)
