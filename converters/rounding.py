"""Floats rounded to the types that checkpoints store, and what they are worth then.

Knows IEEE 754 and nothing of forms. bfloat16 travels as uint16 bit patterns, which numpy has no
type for.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Stored = npt.NDArray[np.generic]

_EXPONENT, _LOWEST_EXPONENT = np.uint32(0xFF << 23), np.uint32((127 - 14) << 23)
# From the power of two below a number to 1.5 times the one 13 above it.
_MAGIC = np.uint32((13 << 23) + (1 << 22))
_SIGN = np.uint32(1 << 15)
# Between the exponents of float32 and of float16.
_REBIASED = np.float32(2.0**-112)
# What is smaller rounds to a finite float16.
_OVERFLOW = 65520.0


def rounded(x: Floats, dtype: str) -> tuple[Stored, Floats]:
    """Round float32 to ``dtype``, to nearest and half to even: as it is stored, and as float32."""
    if dtype == "float32":
        return x, x
    if dtype == "bfloat16":
        stored = _bfloat16(x)
        return stored, from_float(stored, dtype)
    if x.min(initial=0) > -_OVERFLOW and x.max(initial=0) < _OVERFLOW:
        return _float16(x)
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)  # infinities and what is not a number, too
    return half, half.astype(np.float32)


def from_float(stored: Stored, dtype: str) -> Floats:
    """The float32 values of what :func:`rounded` stored."""
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32, copy=False)


def _float16(x: Floats) -> tuple[Stored, Floats]:
    """Numbers within float16's range, by whole arrays: numpy would take them one by one.

    A number's sum with 1.5 times the power of two 13 above its own has just the 11 digits of a
    float16 left of it, or fewer where float16 is subnormal. The result's bits are those of a
    float16 but for where the exponent starts and the sign stands.
    """
    bits = x.view(np.uint32)
    magic = bits & _EXPONENT
    np.maximum(magic, _LOWEST_EXPONENT, out=magic)
    magic += _MAGIC
    values: Floats = x + magic.view(np.float32)
    values -= magic.view(np.float32)
    half = (values * _REBIASED).view(np.uint32)
    half >>= np.uint32(13)
    np.right_shift(bits, np.uint32(16), out=magic)
    magic &= _SIGN
    half |= magic
    return half.astype(np.uint16).view(np.float16), values


def _bfloat16(x: Floats) -> Stored:
    bits = x.view(np.uint32)
    # Round to nearest even on the upper half; a quiet bit keeps not-a-number what it is.
    near = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x40, near).astype(np.uint16)
