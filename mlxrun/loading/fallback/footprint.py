"""What a model of mlx-lm's takes besides its weights: its own caches, and a pass by its widths.

Its classes do not say what they compute; the figures of a pass are those of a plain transformer of
the same widths, with room for what such models compute besides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mlx_lm.models.cache import CacheList, ChunkedKVCache, KVCache, RotatingKVCache

from mlxrun.footprint import DRAW, Footprint, Layer
from mlxrun.kernels.device import Device
from mlxrun.loading.fallback.memory import arrays_in
from mlxrun.loading.fallback.sizes import Sketch

# mlx-lm's caches grow by so many tokens.
_STEP = 256
# Arrays of the stream's and of the feed-forward's width in a layer of a pass.
_STREAMS, _FED = 22, 4


def footprint(sketch: Sketch, config: Mapping[str, Any], device: Device) -> Footprint:
    """What a model takes besides its weights.

    Args:
        sketch: of the model, in the type of the run's activations.
        config: ``config.json``.
    """
    summary, size = sketch.model.summary, sketch.model.dtype.size
    text = config.get("text_config")
    section = {**config, **(text if isinstance(text, Mapping) else {})}
    hidden = summary.hidden_size
    fed = max(_numbers(section, "intermediate_size", "ffn_hidden_size", "d_inner"), default=0)
    stream = size * (_STREAMS * hidden + _FED * (fed or 4 * hidden))
    pair = 0 if device.fused_attention else size * summary.heads
    layers = tuple(_layer(part, stream, pair) for entry in sketch.entries for part in _parts(entry))
    return Footprint(layers, DRAW * sketch.model.vocab_size, joint=sketch.model.joint)


def _layer(entry: Any, stream: int, pair: int) -> Layer:
    if not isinstance(entry, KVCache | RotatingKVCache | ChunkedKVCache):
        state = sum(int(array.nbytes) for array in arrays_in(entry))
        return Layer(fixed=state, twice=True, stream=stream)
    if entry.keys is None:  # of a layer that reads another's
        return Layer(stream=stream, pair=pair)
    kept: list[Any] = [entry.keys, entry.values]
    token = sum(int(a.shape[1] * a.shape[3]) * a.itemsize for a in kept)
    window = None
    if isinstance(entry, RotatingKVCache):
        window = int(entry.max_size)
    elif isinstance(entry, ChunkedKVCache):
        window = int(entry.chunk_size)
    # Only a ring is written over; what lies before the end of the others stays there.
    twice = isinstance(entry, RotatingKVCache)
    return Layer(token=token, window=window, twice=twice, step=_STEP, stream=stream, pair=pair)


def _parts(entry: Any) -> Iterator[Any]:
    if isinstance(entry, CacheList):
        for part in entry.caches:
            yield from _parts(part)
    else:
        yield entry


def _numbers(config: Mapping[str, Any], *names: str) -> Iterator[int]:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            yield value
