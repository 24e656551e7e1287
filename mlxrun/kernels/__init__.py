"""Products over GGUF blocks as they lie in the file, and the small operations of a step.

The one door to device code. :func:`available` gives :class:`Kernels`, or says why there are none.
"""

from __future__ import annotations

from mlxrun.kernels.build import Missing, available
from mlxrun.kernels.matrix import HeadsSpec, Matrix
from mlxrun.kernels.native import Kernels

__all__ = ["HeadsSpec", "Kernels", "Matrix", "Missing", "available"]
