"""The terms of a model's cost, from its config and the bytes of its modules.

Bytes are those of a loaded model (:attr:`Transformer.module_bytes`) or those of headers
(:class:`mlxrun.loader.WeightStorage`); FLOPs come from the config. Reads no weights.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear

from mlxrun.analysis.costs import AttentionCost, ExpertCost, ModelCost, WeightCost
from mlxrun.config import DEFAULT_CACHE, CacheConfig
from mlxrun.kernels.device import device
from mlxrun.kv_cache.factory import block_bytes, bound_bytes, layer_pattern
from mlxrun.kv_cache.options import Window
from mlxrun.loader import DTYPES, definition
from mlxrun.memory.footprint import (
    Execution,
    LayerFootprint,
    block_weights,
    expert_weights,
    footprint,
)
from mlxrun.model import WeightStorage
from mlxrun.models.config import Attention, Experts, LatentAttention, ModelConfig

if TYPE_CHECKING:
    from mlxrun.models.mlx_lm import MLXLMClasses, MLXLMModel

_LAYER = re.compile(r"\blayers\.(\d+)\.(.+)")
_EXPERTS = re.compile(r"\b(switch_mlp|experts|input_linear|output_linear)\b")
_EMBEDDING = re.compile(r"\bembed_tokens$")
_HEAD = re.compile(r"\blm_head(\.bias)?$")
# Experts of mlx-lm's classes that are modules of their own, called as the class likes.
_SINGLE_EXPERT = re.compile(r"\bexperts\.\d+\.")
# Weights that take less than this part of plain ones are packed, at least some of them.
_PLAIN = 0.97


def model_cost(
    config: Mapping[str, Any], storage: WeightStorage, cache: CacheConfig = DEFAULT_CACHE
) -> ModelCost:
    """The cost of any model that can be run.

    Args:
        config: ``config.json`` in Hugging Face terms.
        storage: with the bytes of its modules, for a model of ours.
    """
    defined = definition(config)
    if not isinstance(defined, ModelConfig):
        return mlx_lm_cost(defined, config, storage)
    dtype = DTYPES[storage.dtype]
    layers = footprint(defined, Execution(dtype, cache=cache)).layers
    attention = tuple(
        _attention_cost(layer, block.attention, dtype, cache)
        for layer, block in zip(layers, defined.layers, strict=True)
    )
    active = sum(
        block_weights(block, defined.hidden_size)
        + expert_weights(block.feed_forward, defined.hidden_size)
        for block in defined.layers
    )
    head = defined.vocab_size * defined.hidden_size
    return ModelCost(weight_cost(defined, storage.modules), attention, active, head)


def weight_cost(config: ModelConfig, modules: Mapping[str, float]) -> WeightCost:
    """Bytes of modules, by name, by how much of them a pass reads."""
    table = head = positions = always = 0.0
    experts: defaultdict[tuple[int, int], float] = defaultdict(float)
    for name, nbytes in modules.items():
        if _EMBEDDING.search(name):
            table += nbytes
        elif _HEAD.search(name):
            head += nbytes
        elif config.positions and name.endswith(f".{config.positions}"):
            positions += nbytes
        elif routed := _routed_experts(config, name):
            experts[routed.count, routed.used] += nbytes
        else:
            always += nbytes
    row = table / config.vocab_size + positions / config.context_length
    costs = tuple(ExpertCost(*numbers, nbytes) for numbers, nbytes in experts.items())
    if config.tied:
        return WeightCost(always, table, row, positions, costs)
    return WeightCost(always, head, row, table + positions, costs)


def _routed_experts(config: ModelConfig, name: str) -> Experts | None:
    """The routed experts that a module is one of, or a stack of."""
    match = _LAYER.search(name)
    if match is None or int(match[1]) >= len(config.layers) or "shared" in name:
        return None
    feed_forward = config.layers[int(match[1])].feed_forward
    return feed_forward if isinstance(feed_forward, Experts) and _EXPERTS.search(match[2]) else None


def _attention_cost(
    layer: LayerFootprint,
    attention: Attention | LatentAttention,
    dtype: mx.Dtype,
    cache: CacheConfig,
) -> AttentionCost:
    shape = attention.cache_shape
    pattern = layer_pattern(cache, attention.window)
    sparse = None if isinstance(pattern, Window) else pattern
    # Bounds are stored with each token, but read by the block.
    token = layer.token - bound_bytes(cache, shape, attention.window, dtype)
    bound = block_bytes(shape, dtype) if sparse else 0
    if isinstance(attention, LatentAttention):  # heads share one latent
        pair = attention.heads * (2 * attention.kv_lora_rank + attention.rope.dims)
    else:
        pair = attention.heads * 2 * attention.head_dim
    # Keys by channel that are not packed yet count as packed: they are more bytes, never fewer.
    return AttentionCost(token, window=layer.window, pair=pair, sparse=sparse, bound=bound)


def mlx_lm_cost(
    classes: MLXLMClasses, config: Mapping[str, Any], storage: WeightStorage
) -> ModelCost:
    """The cost of a model of mlx-lm's classes, whose FLOPs are not known.

    Bytes are shared out by numbers of weights, which is exact where all are plain.
    """
    from mlxrun.models.mlx_lm import sketch

    dtype = DTYPES[storage.dtype]
    model = sketch(classes, config, dtype)
    footprint = model.footprint(device())
    layers = tuple(
        AttentionCost(layer.token, layer.fixed, state=not layer.token, window=layer.window)
        for layer in footprint.layers
    )
    read = weight_traffic(model)
    each = storage.nbytes / read.total
    experts = tuple(ExpertCost(*numbers, each * n) for numbers, n in read.routed.items())
    unread = each * (read.table + read.unrouted)
    weights = WeightCost(each * read.always, each * read.head, each * read.row, unread, experts)
    unknown = ["operations, and so whether compute binds"]
    if (experts or read.table) and each < _PLAIN * dtype.size:
        unknown.append("which of its parts are packed in more bits than others: all count the same")
    if read.unrouted:
        unknown.append("how many of its experts a pass reads: none is counted")
    return ModelCost(weights, layers, None, 0, tuple(unknown), footprint.joint)


@dataclass(frozen=True)
class WeightTraffic:
    """Numbers of weights, by how many of them a pass reads."""

    total: int
    head: int  # output matrix; also that of tied embeddings
    row: int  # read for every token
    table: int  # rows of embeddings that are only looked up
    routed: dict[tuple[int, int], int]  # of experts, by their number and those of one token
    unrouted: int  # of experts whose routing (top-k) could not be determined

    @property
    def always(self) -> int:
        return self.total - self.head - self.table - self.unrouted - sum(self.routed.values())


def weight_traffic(model: MLXLMModel) -> WeightTraffic:
    """The weights that a pass of an unquantized sketch reads.

    Its modules record their calls while the graph of a pass over one token is built, which is not
    computed.
    """
    from mlx_lm.models.switch_layers import SwitchLinear

    from mlxrun.models.mlx_lm import named_arrays

    modules = dict(model.module.named_modules())
    sizes: Counter[str] = Counter()
    for name, array in named_arrays(model.module).items():
        sizes[name.rpartition(".")[0]] += int(array.size)
    # Experts' indices or token ids that a module is called with; None as an output matrix.
    calls: dict[str, list[mx.array | None]] = {path: [] for path in modules}
    for path, module in modules.items():
        if isinstance(module, SwitchLinear | Embedding):
            _record_calls(module, calls[path].append)
    model(mx.array([[0]]), model.make_cache())

    head = row = table = 0
    routed: Counter[tuple[int, int]] = Counter()
    for path, module in modules.items():
        looked_up = [each.size for each in calls[path] if each is not None]
        if isinstance(module, SwitchLinear):
            count = int(module.weight.shape[0])
            routed[count, min(count, max(looked_up, default=0))] += sizes[path]
        elif isinstance(module, Embedding):
            row += sum(looked_up) * sizes[path] // int(module.weight.shape[0])
            multiplied = len(looked_up) < len(calls[path])
            head, table = head + sizes[path] * multiplied, table + sizes[path] * (not multiplied)
        elif isinstance(module, Linear) and module.weight.shape[0] == model.vocab_size:
            head += sizes[path]
    if not head:  # some classes multiply by the embedding's array without a call
        tied = (
            sizes[path]
            for path, module in modules.items()
            if isinstance(module, Embedding) and module.weight.shape[0] == model.vocab_size
        )
        head = next(tied, 0)
        table -= head
    unrouted = sum(size for path, size in sizes.items() if _SINGLE_EXPERT.search(f"{path}."))
    return WeightTraffic(sum(sizes.values()), head, row, table, dict(routed), unrouted)


def _record_calls(module: Any, record: Callable[[mx.array | None], None]) -> None:
    kind: Any = type(module)

    def called(self: Any, x: mx.array, *rest: Any, **options: Any) -> Any:
        record(rest[0] if rest else options.get("indices", x))
        return kind.__call__(self, x, *rest, **options)

    def as_linear(self: Any, x: mx.array) -> Any:
        record(None)
        return kind.as_linear(self, x)

    module.__class__ = type(kind.__name__, (kind,), {"__call__": called, "as_linear": as_linear})
