"""Gated norm: norm(x) * u with dropout."""

from kernels.norm_gate.op import norm_gate

__all__ = ["norm_gate"]
