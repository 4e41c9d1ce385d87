"""Rotary embedding: queries and keys turned by angles, so that q k depends on differences."""

from kernels.rotary.op import rotary
from kernels.rotary.reference import Rotation

__all__ = ["Rotation", "rotary"]
