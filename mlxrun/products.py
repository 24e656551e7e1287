"""The option ``products``: bits of activations in products with GGUF blocks on the CPU.

Its values, names and default; the arithmetic is in :mod:`mlxrun.kernels`.
"""

from __future__ import annotations

import os

from mlxrun.errors import ParameterError

VARIABLE = "MLXRUN_PRODUCTS"
#: Name to planes of int8 that an activation becomes.
PLANES = {"fast": 1, "near": 2, "exact": 3}
DEFAULT = "near"


def products_named(name: str | None) -> str:
    """The value of the option, or the environment's or the default where it is None."""
    value, where = name, "products"
    if value is None:
        value, where = os.environ.get(VARIABLE, "").strip() or DEFAULT, VARIABLE
    if not isinstance(value, str) or value not in PLANES:
        raise ParameterError(where, value, f"one of {', '.join(PLANES)}")
    return value


def described(name: str) -> str:
    """A value in words."""
    return f"{name}, activations in {8 * PLANES[name]} bits"
