"""How many weights of a model of mlx-lm's a pass reads, by its parts.

Its modules record their calls while the graph of a pass over one token is built, which is not
computed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear
from mlx_lm.models.switch_layers import SwitchLinear

from mlxrun.models.mlx_lm import MLXLMModel, named_arrays

# Experts that are modules of their own, which a class calls as it likes.
_APART = re.compile(r"\bexperts\.\d+\.")


@dataclass(frozen=True)
class WeightTraffic:
    """Numbers of weights, by how many of them a pass reads.

    Attributes:
        total: all of them; those that are not named below are read by every pass.
        head: the output matrix; also of tied embeddings.
        row: looked up for every token.
        table: rows of embeddings that are only looked up.
        routed: of experts, by how many there are and how many of them a token goes through.
        unrouted: of experts whose routing (top-k) could not be determined.
    """

    total: int
    head: int
    row: int
    table: int
    routed: dict[tuple[int, int], int]
    unrouted: int

    @property
    def always(self) -> int:
        """Read by every pass."""
        return self.total - self.head - self.table - self.unrouted - sum(self.routed.values())


def weight_traffic(model: MLXLMModel) -> WeightTraffic:
    """The weights that a pass of an unquantized sketch reads; its modules keep recording."""
    modules = dict(model.module.named_modules())
    sizes: Counter[str] = Counter()
    for name, array in named_arrays(model.module).items():
        sizes[name.rpartition(".")[0]] += int(array.size)
    # Experts' indices or token ids that a module is called with; None as an output matrix.
    calls: dict[str, list[mx.array | None]] = {path: [] for path in modules}
    for path, module in modules.items():
        if isinstance(module, SwitchLinear | Embedding):
            _watch(module, calls[path].append)
    model(mx.array([[0]]), model.make_cache())

    head = row = table = 0
    routed: Counter[tuple[int, int]] = Counter()
    for path, module in modules.items():
        looked = [each.size for each in calls[path] if each is not None]
        if isinstance(module, SwitchLinear):
            count = int(module.weight.shape[0])
            routed[count, min(count, max(looked, default=0))] += sizes[path]
        elif isinstance(module, Embedding):
            row += sum(looked) * sizes[path] // int(module.weight.shape[0])
            multiplied = len(looked) < len(calls[path])
            head, table = head + sizes[path] * multiplied, table + sizes[path] * (not multiplied)
        elif isinstance(module, Linear) and module.weight.shape[0] == model.vocab_size:
            head += sizes[path]
    if not head:  # some classes multiply by the embedding's array without a call
        tied = (sizes[p] for p, m in modules.items() if _is_vocabulary(m, model.vocab_size))
        head = next(tied, 0)
        table -= head
    unrouted = sum(size for path, size in sizes.items() if _APART.search(f"{path}."))
    return WeightTraffic(sum(sizes.values()), head, row, table, dict(routed), unrouted)


def _is_vocabulary(module: Any, size: int) -> bool:
    return isinstance(module, Embedding) and module.weight.shape[0] == size


def _watch(module: Any, note: Callable[[mx.array | None], None]) -> None:
    """Have a module record its calls."""
    kind: Any = type(module)

    def called(self: Any, x: mx.array, *rest: Any, **options: Any) -> Any:
        note(rest[0] if rest else options.get("indices", x))
        return kind.__call__(self, x, *rest, **options)

    def as_linear(self: Any, x: mx.array) -> Any:
        note(None)
        return kind.as_linear(self, x)

    module.__class__ = type(kind.__name__, (kind,), {"__call__": called, "as_linear": as_linear})
