"""Gated norm: norm(x) * u with dropout."""

from kernels.norm_gate.op import NormGateFp8, norm_gate, norm_gate_backward, norm_gate_fp8

__all__ = ["NormGateFp8", "norm_gate", "norm_gate_backward", "norm_gate_fp8"]
