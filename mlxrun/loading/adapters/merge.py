"""Adapters merged into weights: the arithmetic of ``weights.low_rank`` on rows of plain float32."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from converters.forms import Floats
from converters.merge import Patch, PrepareMerge, Rows
from mlxrun.loading.adapters.adapters import AdapterChoice, Adapters, read_adapters
from mlxrun.weights.low_rank import TINY, Update


def merging(choice: AdapterChoice) -> PrepareMerge | None:
    """What reads adapters once the model is known, or None where there are none to read.

    Args:
        choice: as :func:`mlxrun.convert` takes it.
    """
    if isinstance(choice, list | tuple) and not choice:
        return None
    return lambda config: Merger(read_adapters(choice, config))


class Merger:
    """All adapters of a conversion, for ``converters`` to merge (``converters.merge.Merge``)."""

    def __init__(self, adapters: Adapters) -> None:
        self._adapters = adapters

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse changes of parameters that a model does not have.

        Raises:
            AdapterError: there are such.
        """
        self._adapters.check_replaced(shapes)
        self._adapters.check_applied(shapes)
        for module, updates in self._adapters.updates.items():
            for update in updates:
                update.check(module, shapes[f"{module}.weight"])

    def patch(self, name: str) -> Patch | None:
        """What a parameter's rows go through, or None."""
        updates = self._adapters.updates.get(name.removesuffix(".weight"), ())
        steps = [_added(update) for update in updates] if name.endswith(".weight") else []
        new = self._adapters.replaced.get(name)
        if new is None and not steps:
            return None
        whole = None if new is None else _numpy(new).reshape(-1, new.shape[-1])

        def patch(values: Floats, rows: Rows) -> Floats:
            plain = values if whole is None else whole[rows]
            merged = plain.copy()
            for step in steps:
                merged += step(plain, rows)
            return merged

        return patch


def _added(update: Update) -> Patch:
    """What an update adds to rows of the plain matrix."""
    stack = update.a.shape[:-2]
    a, b = _numpy(update.a), _numpy(update.b)
    lengths = None if update.lengths is None else _numpy(update.lengths).reshape(-1)
    height, first = b.shape[-2], update.first or 0
    a, b = a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])

    def added(plain: Floats, rows: Rows) -> Floats:
        result = np.zeros_like(plain)
        # Rows of a stack are numbered through; a stack has no fused projections.
        matrix, row = np.divmod(rows, height) if stack else (np.zeros_like(rows), rows - first)
        for each in np.unique(matrix):
            here = (matrix == each) & (row >= 0) & (row < height)
            change = np.float32(update.scale) * (b[each, row[here]] @ a[each])
            if lengths is not None:
                adapted = plain[here] + change
                wanted = lengths[each * height + row[here]]
                stretch = wanted / np.maximum(np.linalg.norm(adapted, axis=-1), TINY)
                change = stretch[:, None] * adapted - plain[here]
            result[here] = np.float32(update.strength) * change
        return result

    return added


def _numpy(array: mx.array) -> Floats:
    return np.array(array.astype(mx.float32))
