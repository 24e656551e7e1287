"""Adapters that know the parts of a projection which the model has fused, and the other way round.

A fused projection has the rows of its parts below each other, so an update of a part is one of some
of its rows, and each part takes its own rows of an update of the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from mlxrun.errors import AdapterError
from mlxrun.models.config import Attention, FeedForward, ModelConfig
from mlxrun.weights.low_rank import OTHER_MODEL, Update


@dataclass(frozen=True)
class _Fusion:
    """A projection and the rows of its parts, by module name; ``whole``: the model has it fused."""

    module: str
    parts: Mapping[str, int]
    whole: bool


def spread(updates: Mapping[str, Update], config: ModelConfig) -> dict[str, list[Update]]:
    """The updates by modules that the model has.

    Raises:
        AdapterError: a part has other rows than the model gives it.
    """
    found = {module: [update] for module, update in updates.items()}
    for fusion in _fusions(config):
        if fusion.whole:
            _gather(found, fusion)
        elif fusion.module in found:
            _scatter(found, fusion)
    return found


def _fusions(config: ModelConfig) -> Iterator[_Fusion]:
    """Every projection of the model that is fused or might be."""
    for i, layer in enumerate(config.layers):
        name, attention, inner = f"model.layers.{i}", layer.attention, layer.feed_forward
        if isinstance(attention, Attention):
            keys = attention.kv_heads * attention.head_dim
            rows = {"q_proj": attention.heads * attention.head_dim, "k_proj": keys, "v_proj": keys}
            yield _fusion(f"{name}.self_attn", "qkv_proj", rows, attention.fused)
        if isinstance(inner, FeedForward):
            rows = {"gate_proj": inner.size, "up_proj": inner.size}
            yield _fusion(f"{name}.{layer.mlp}", "gate_up_proj", rows, inner.fused)


def _fusion(place: str, whole: str, rows: Mapping[str, int], fused: bool) -> _Fusion:
    parts = {f"{place}.{part}": count for part, count in rows.items()}
    return _Fusion(f"{place}.{whole}", parts, fused)


def _gather(found: dict[str, list[Update]], fusion: _Fusion) -> None:
    first = 0
    for part, rows in fusion.parts.items():
        for update in found.pop(part, ()):
            _expect(update, part, rows)
            found.setdefault(fusion.module, []).append(replace(update, first=first))
        first += rows


def _scatter(found: dict[str, list[Update]], fusion: _Fusion) -> None:
    for update in found.pop(fusion.module):
        _expect(update, fusion.module, sum(fusion.parts.values()))
        first = 0
        for part, rows in fusion.parts.items():
            own = slice(first, first + rows)
            lengths = None if update.lengths is None else update.lengths[own]
            found.setdefault(part, []).append(replace(update, b=update.b[own], lengths=lengths))
            first += rows


def _expect(update: Update, module: str, rows: int) -> None:
    if update.b.ndim != 2 or update.b.shape[0] != rows:
        raise AdapterError(
            f"{update.origin}: expected {rows} rows for {module}, found {update.b.shape[0]}",
            hint=OTHER_MODEL,
        )
