"""Adapters merged into weights: the arithmetic of ``weights.low_rank`` on rows of plain float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from converters.merge import Patch, PrepareMerge, Rows
from converters.rounding import Floats
from mlxrun.loading.adapters.adapters import AdapterChoice, Adapters, read_adapters
from mlxrun.models.families import FAMILIES, model_config
from mlxrun.weights.low_rank import TINY, Update


def merging(choice: AdapterChoice) -> PrepareMerge | None:
    """What reads adapters once the model is known, or None where there are none to read.

    Args:
        choice: as :func:`mlxrun.convert` takes it.
    """
    if isinstance(choice, list | tuple) and not choice:
        return None

    def merger(config: Mapping[str, Any]) -> Merger:
        model = model_config(dict(config)) if config.get("model_type") in FAMILIES else None
        return Merger(read_adapters(choice, config, model))

    return merger


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
        steps = [_adding(update) for update in updates] if name.endswith(".weight") else []
        new = self._adapters.replaced.get(name)
        if new is None and not steps:
            return None
        whole = None if new is None else _numpy(new).reshape(-1, new.shape[-1])

        def patch(values: Floats, rows: Rows) -> Floats:
            plain = values if whole is None else whole[rows]
            merged = plain.copy()
            for step in steps:
                step(plain, rows, merged)
            return merged

        return patch


def _adding(update: Update) -> Callable[[Floats, Rows, Floats], None]:
    """A function that adds to ``merged`` (n, columns) what an update makes of rows ``plain``."""
    a, b = _numpy(update.a), _numpy(update.b)
    height, columns, first = b.shape[-2], a.shape[-1], update.first or 0
    a, b = a.reshape(-1, update.rank, columns), b.reshape(-1, height, update.rank)
    b *= np.float32(update.scale)
    lengths = None if update.lengths is None else _numpy(update.lengths).reshape(-1, height)
    strength = np.float32(update.strength)

    def change(matrix: int, row: Rows, plain: Floats) -> Floats:
        # Not a matrix product: a BLAS would start threads of its own within the pool's.
        product: Floats = np.einsum("nr,rc->nc", b[matrix, row], a[matrix])
        if lengths is None:
            product *= strength
            return product
        adapted = plain + product
        reached = np.maximum(np.linalg.norm(adapted, axis=-1), TINY)
        stretched: Floats = (lengths[matrix, row] / reached)[:, None] * adapted
        return strength * (stretched - plain)

    def add(plain: Floats, rows: Rows, merged: Floats) -> None:
        # Rows of a stack are numbered through; a stack has no fused projections.
        matrix, row = np.divmod(rows, height) if len(a) > 1 else (np.zeros_like(rows), rows - first)
        for each in np.unique(matrix):
            here = (matrix == each) & (row >= 0) & (row < height)
            if here.all():
                merged += change(int(each), row, plain)
            else:
                merged[here] += change(int(each), row[here], plain[here])

    return add


def _numpy(array: mx.array) -> Floats:
    """A float32 copy."""
    return np.array(array.astype(mx.float32))
