"""An asynchronous sum into global memory by the copy engine.

Gluon of Triton 3.6 has the instruction in its compiler and not yet in its language; from 3.8 on it
is public. requirements/cuda.txt pins 3.6.
"""

from typing import Any

from triton.experimental.gluon.language._core import builtin, ir


@builtin
def async_reduce_add(tensor_desc: Any, coord: Any, source: Any, _semantic: Any = None) -> None:
    """Add the tile `source` in shared memory to global memory, rows past its end left out.

    To be waited for with tma.store_wait, like a store.
    """
    at = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(
        ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, at, source.handle
    )
