"""Input encoding: scaled embedding plus learned position and time."""

from kernels.position_time.op import position_time

__all__ = ["position_time"]
