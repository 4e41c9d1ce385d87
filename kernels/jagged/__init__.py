"""Jagged rows: concatenate, split, take the newest, to and from padded."""

from kernels.jagged.op import concat, from_padded, newest, split, to_padded

__all__ = ["concat", "from_padded", "newest", "split", "to_padded"]
