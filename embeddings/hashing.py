"""One hash of 64-bit ids, the same everywhere."""

from torch import Tensor


def hash_ids(ids: Tensor) -> Tensor:
    """Return a well-mixed hash of each id, int64 in 0 .. 2^63 - 1, the same on every platform.

    With x the id's 64 bits and arithmetic modulo 2^64:

        x += 0x9E3779B97F4A7C15
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB
        x = x ^ (x >> 31)

    then the top bit is dropped. Changing it would lose every trained hashed table.

    Args:
        ids: int64, any shape and any value.

    Source: SplitMix64 (Steele, Lea, Flood 2014), its first output from the state x.
    """
    x = ids + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    mixed: Tensor = (x ^ _shift_right(x, 31)) & (2**63 - 1)
    return mixed


def _signed(bits: int) -> int:
    return bits - 2**64 if bits >= 2**63 else bits


def _shift_right(x: Tensor, count: int) -> Tensor:
    # int64 shifts copy the sign bit; the mask makes them those of unsigned numbers.
    shifted: Tensor = (x >> count) & (2 ** (64 - count) - 1)
    return shifted
