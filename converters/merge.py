"""What is merged into weights while they are converted, as the converters see it.

Knows nothing of adapters: whoever merges says which parameters change, and changes their rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from converters.rounding import Floats

Rows = npt.NDArray[np.intp]
#: ``(values (n, columns), numbers of these rows (n,)) -> values``, float32. Leading axes of a
#: parameter count as rows; one without any is a single row.
Patch = Callable[[Floats, Rows], Floats]


class Merge(Protocol):
    """Changes of a model's parameters, by Hugging Face name."""

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse changes that have no place in a model with these parameters.

        Raises:
            AdapterError: a change is of another parameter, or of one of another shape.
        """

    def patch(self, name: str) -> Patch | None:
        """What a parameter's rows go through, or None where it stays as it is."""


#: From ``config.json`` in Hugging Face terms to what is merged into that model.
PrepareMerge = Callable[[Mapping[str, Any]], Merge]


def in_order(patch: Patch, order: Rows | None, rows: int) -> Patch:
    """The patch for rows that are stored in another order.

    Args:
        order: where each of the parameter's ``rows`` is stored, or None for the same order.
    """
    if order is None:
        return patch
    places = np.empty(rows, np.intp)
    places[order] = np.arange(rows)
    return lambda values, numbers: patch(values, places[numbers])
