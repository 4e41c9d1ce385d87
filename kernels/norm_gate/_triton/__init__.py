"""Gated norm, one pass forward and one backward.

Forward:  xh = (x - mean) * rstd,  n = xh * w + b,  out = keep * [u, x,] n * u / (1 - dropout)
Backward: n is computed again from x, mean and rstd; what dropout kept, from the seed.
          du = dy * n [+ dout_u],  g = dy * u * w
          dx = rstd * (g - mean(g) - xh * mean(g * xh)) [+ dout_x]
          dw = sum(dy * u * xh),  db = sum(dy * u)
          out is written again where it is asked for: all that it is made of is at hand.
          In a layer u is silu(z): from z the kernel makes u and, of du, du * silu'(z).

L rows of C = G * V channels; a program owns one group (axis 1 of the grid), so that the sums of its
weights stay in registers. Sums over rows as in layer_norm: partial rows, added in a fixed order.
"""

from kernels.norm_gate._triton.backward import norm_gate_bwd, norm_gate_silu_bwd
from kernels.norm_gate._triton.forward import norm_gate_fp8_fwd, norm_gate_fwd

__all__ = ["norm_gate_bwd", "norm_gate_fp8_fwd", "norm_gate_fwd", "norm_gate_silu_bwd"]
