"""Adapters beside the weights of mlx-lm's classes, through mlx-lm's own layers for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.quantized import QuantizedEmbedding, QuantizedLinear
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear

from mlxrun.errors import AdapterError
from mlxrun.weights.low_rank import OTHER_MODEL, Update, combined

# A model of text and images has the text model as a part.
_PREFIXES = ("", "language_model.")


def adapt(model: Any, updates: Mapping[str, Sequence[Update]], dtype: mx.Dtype) -> None:
    """Wrap the modules that adapters change.

    Args:
        model: mlx-lm's module with its weights.
        updates: by module.
        dtype: of the run.

    Raises:
        AdapterError: the model has no such module, or one of another kind or shape.
    """
    modules = dict(model.named_modules())
    wrapped = []
    for name, changes in updates.items():
        path = next((p + name for p in _PREFIXES if p + name in modules), None)
        if path is None:
            raise AdapterError(
                f"{changes[0].origin}: the model has no such module", hint=OTHER_MODEL
            )
        wrapped.append((path, _wrapped(path, modules[path], changes, dtype)))
    model.update_modules(tree_unflatten(wrapped))
    model.eval()


def _wrapped(path: str, module: Any, updates: Sequence[Update], dtype: mx.Dtype) -> Any:
    if any(update.lengths is not None for update in updates):
        raise AdapterError(
            f"{updates[0].origin}: DoRA is not applied to models that run through mlx-lm",
            hint="Merge it: mlxrun convert MODEL --adapter PATH, or mlxrun.convert(adapter=PATH)",
        )
    kinds = (
        ((Linear, QuantizedLinear), LoRALinear),
        ((SwitchLinear, QuantizedSwitchLinear), LoRASwitchLinear),
        ((Embedding, QuantizedEmbedding), LoRAEmbedding),
    )
    layer = next((layer for kind, layer in kinds if isinstance(module, kind)), None)
    if layer is None:
        raise AdapterError(
            f"{updates[0].origin}: {path} is a {type(module).__name__}, which takes no adapter",
            hint=OTHER_MODEL,
        )
    shape = _shape(module)
    for update in updates:
        update.check(path, shape)
    both = combined(updates, shape[-2], lambda: mx.zeros(shape), dtype)
    made = layer.from_base(module, r=both.a.shape[-2], scale=1.0)
    if layer is LoRALinear:
        made.lora_a, made.lora_b = both.a.T, both.b.T
    elif layer is LoRASwitchLinear:
        made.lora_a, made.lora_b = both.a, both.b
    else:
        made.lora_a, made.lora_b = both.b, both.a
    return made


def _shape(module: Any) -> tuple[int, ...]:
    """Of a module's matrix or stack of them, whatever form it has."""
    *leading, columns = module.weight.shape
    if "scales" in module:
        columns = columns * 32 // module.bits
    return (*leading, columns)
