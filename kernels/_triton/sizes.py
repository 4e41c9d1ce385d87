"""Sizes of grids and blocks.

Triton's functions of these names serve kernels too, and a call takes 2 to 4 us of a processor; the
launches of a layer make thirty.
"""


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up, for b > 0."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the least power of 2 that is at least n, for n > 0."""
    return 1 << (n - 1).bit_length()
