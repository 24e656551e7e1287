"""Models that mlxrun does not define, through mlx-lm's model classes.

Imported only when such a model is loaded, for it imports mlx-lm. Code of a model directory is never
run, and a ``model_type``, which comes from a stranger's file, chooses among mlx-lm's own classes
only. Sections: classes, weights, model, cache, windows, adapters, conversion, footprint.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Self
from typing import cast as typed

import mlx.core as mx
import numpy as np
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.quantized import QuantizedEmbedding, QuantizedLinear, quantize
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm import utils
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
)
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from converters.gguf.validate import MAX_BLOCKS
from converters.huggingface.names import OTHER_TOWERS
from converters.huggingface.source import Plan
from converters.huggingface.weights import Weights
from converters.quantize.layout import FIXED_MODES, Layout, affine, fixed
from mlxrun.config import DEFAULT_CACHE, CacheConfig
from mlxrun.errors import (
    AdapterError,
    CacheError,
    CheckpointError,
    ParameterError,
    UnsupportedArchitectureError,
)
from mlxrun.kernels.compilation import avoid_fusion
from mlxrun.kernels.device import Device, device
from mlxrun.kv_cache import base
from mlxrun.kv_cache.dense import copied, joined
from mlxrun.memory.footprint import SAMPLING, Footprint, LayerFootprint
from mlxrun.model import ModelSummary
from mlxrun.weights.linear import MLXWeight
from mlxrun.weights.lora import OTHER_MODEL, LoRA, combined
from mlxrun.weights.parameters import Parameters

Config = Mapping[str, Any]
Arrays = dict[str, mx.array]

# --- classes --------------------------------------------------------------------------------------

# Files next to the models that define none.
_TOOLS = {
    "activations", "base", "bitlinear_layers", "cache", "gated_delta", "mla", "pipeline",
    "rope_utils", "ssm", "switch_layers",
}  # fmt: skip
_HEADS = (
    "num_attention_heads", "num_key_value_heads", "num_global_key_value_heads", "head_dim",
    "global_head_dim",
)  # fmt: skip


class MLXLMClasses(NamedTuple):
    """``Model`` and ``ModelArgs`` of one of mlx-lm's model files."""

    model: Any
    args: Any

    def module(self, config: Config) -> Any:
        """The module of a ``config.json``, without the weights of a checkpoint."""
        for section in (config, config.get("text_config")):
            if isinstance(section, Mapping):
                _check_counts(section)
        with _describing(config):
            return self.model(self.args.from_dict(_untagged(dict(config))))


def classes(config: Config) -> MLXLMClasses | None:
    """mlx-lm's classes for a ``config.json``; None where it has none."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        return None
    if config.get("model_file") is not None:
        raise UnsupportedArchitectureError(
            f"config.json asks to run {str(config['model_file'])[:80]!r} of the model directory",
            hint="Code that comes with weights is never run; use a model of a known model_type",
        )
    avoid_fusion()  # its models compile functions of theirs
    if kind not in _model_files() and kind not in utils.MODEL_REMAPPING:
        return None
    try:
        return MLXLMClasses(*utils._get_classes(dict(config)))
    except (ValueError, AttributeError):
        return None


def unsupported(kind: object, native: Iterable[str]) -> UnsupportedArchitectureError:
    """The error for an unknown ``model_type``, with the nearest known one.

    Args:
        native: the model types that mlxrun defines.
    """
    known = sorted({*native, *_model_files()})
    near = difflib.get_close_matches(str(kind)[:80], known, n=1, cutoff=0.0)
    return UnsupportedArchitectureError(
        f"model_type {str(kind)[:80]!r} is not supported",
        hint=f"The nearest known one is {near[0]}" if near else None,
    )


@cache
def _model_files() -> frozenset[str]:
    files = Path(utils.__file__).parent.joinpath("models").glob("*.py")
    return frozenset(file.stem for file in files) - _TOOLS - {"__init__"}


@contextmanager
def _describing(config: Config) -> Iterator[None]:
    """Whatever a class raises on odd values becomes one of our errors."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"config.json does not describe a {str(config.get('model_type'))[:80]}: {error}"
        ) from error


def _check_counts(section: Config) -> None:
    """Refuse what would take for ever, or what MLX divides by or looks up unchecked, and dies."""
    for name, limit in {"num_hidden_layers": MAX_BLOCKS, **dict.fromkeys(_HEADS, 1 << 20)}.items():
        value = section.get(name)
        if isinstance(value, int) and not 0 < value <= limit:
            raise CheckpointError(f"config.json has an impossible {name}: {value}")
    active, inputs = section.get("altup_active_idx", 0), section.get("altup_num_inputs", 4)
    if isinstance(active, int) and isinstance(inputs, int) and not 0 <= active < inputs:
        raise CheckpointError(f"config.json has an impossible altup_active_idx: {active}")


def _untagged(value: Any) -> Any:
    """Numbers that JSON cannot hold, which transformers writes as ``{"__float__": "Infinity"}``."""
    if isinstance(value, Mapping):
        tag = value.get("__float__") if len(value) == 1 else None
        if tag in ("Infinity", "-Infinity", "NaN"):
            return float(tag)
        return {key: _untagged(entry) for key, entry in value.items()}
    return [_untagged(entry) for entry in value] if isinstance(value, list) else value


# --- weights --------------------------------------------------------------------------------------

# Parameters of which mlx-lm takes an exponential in float32: half precision would show.
_PRECISE = "A_log"
_TOWERS = (*OTHER_TOWERS, "visual.", "audio_tower.", "embed_audio.", "embed_vision.", "mtp.")


def build(found: MLXLMClasses, config: Config, params: Parameters) -> MLXLMModel:
    """mlx-lm's class over a checkpoint's weights."""

    def filled(precise: bool) -> MLXLMModel:
        module = found.module(config)
        unused = fill(module, params, precise=precise)
        if params.updates:
            adapt(module, params.updates, params.dtype)
        plain = any(isinstance(part, SwitchLinear) for part in module.modules())
        if plain and not device().gathers_halves and params.dtype != mx.float32:
            name = str(params.dtype).removeprefix("mlx.core.")
            raise ParameterError(
                "dtype", name, "float32: MLX's CPU computes plain experts in no other"
            )
        return MLXLMModel(module, config, params.dtype, unused)

    model = _unpromoted(filled)
    model.materialize()
    return model


def sketch(found: MLXLMClasses, config: Config, dtype: mx.Dtype = mx.float16) -> MLXLMModel:
    """The model that a config means, its weights never computed, in the types of a loaded one.

    Args:
        dtype: of activations. Classes keep some states in float32 whatever it is.
    """

    def made(precise: bool) -> MLXLMModel:
        module = found.module(config)
        stays = _stays(module, precise)
        floats = {
            name: array.astype(dtype)
            for name, array in named_arrays(module).items()
            if mx.issubdtype(array.dtype, mx.floating) and not stays(name)
        }
        module.load_weights(list(floats.items()), strict=False)
        return MLXLMModel(module, config, dtype)

    return _unpromoted(made)


def _unpromoted(make: Callable[[bool], MLXLMModel]) -> MLXLMModel:
    """The model with precise rates of decay, unless these make it compute in float32 throughout."""
    precise = make(True)
    if not precise.promotes:
        return precise
    plain = make(False)
    return precise if plain.promotes else plain


def fill(module: Any, params: Parameters, *, precise: bool = True) -> list[str]:
    """Give a module of mlx-lm its weights.

    Args:
        params: the weights, under the names of a checkpoint or under the module's own.
        precise: leave the rates of state-space layers in float32 where they are stored so.

    Returns:
        Names that the module has no place for.
    """
    arrays, needed, _ = _matched(module, params)
    checked = replace(params, arrays=arrays, prefix="")
    stays = _stays(module, precise)
    given = {name: checked.array(name, cast=not stays(name)) for name in needed}
    module.load_weights(list(given.items()), strict=False)
    module.eval()
    # The classes drop parameters for images and sound without a word.
    towers = {n for n in params.arrays if n.removeprefix("model.").startswith(_TOWERS)}
    return sorted((set(arrays) | towers) - needed)


def named_arrays(module: Any) -> Arrays:
    """The parameters of a module by their full names."""
    return dict(typed("list[tuple[str, mx.array]]", tree_flatten(module.parameters())))


def _stays(module: Any, precise: bool) -> Callable[[str], bool]:
    """Which parameters of a module stay in the type in which they are stored."""
    cast = getattr(module, "cast_predicate", lambda name: True)
    return lambda name: not cast(name) or (precise and name.endswith(_PRECISE))


def _matched(module: Any, params: Parameters) -> tuple[Arrays, set[str], dict[str, Layout]]:
    """The weights under a module's own names, the names it needs, and its quantized modules.

    The module becomes quantized where they are.
    """
    arrays = _sanitized(module, dict(params.arrays))
    layouts = _quantize(module, arrays, params)
    shapes = {name: array.shape for name, array in named_arrays(module).items()}
    missing = [name for name in shapes if name not in arrays]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        left = sorted(set(arrays) - set(shapes))
        raise CheckpointError(
            f"the weights have no {', '.join(missing[:3])}{more}"
            + (f"; they have {', '.join(left[:3])} instead" if left else ""),
            hint="Download or convert the model again",
        )
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise CheckpointError(
                f"{name} has the shape {arrays[name].shape}, config.json implies {shape}"
            )
    return arrays, set(shapes), layouts


def _sanitized(module: Any, arrays: Arrays) -> Arrays:
    """The arrays under the module's names, as mlx-lm's class renames them."""
    if not hasattr(module, "sanitize"):
        return arrays
    try:
        renamed: Arrays = module.sanitize(arrays)
    except Exception as error:  # whatever a class raises on names or shapes it does not expect
        what = f"the weights have no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"mlx-lm's {module.model_type} cannot use these weights: {what}",
            hint="Download or convert the model again",
        ) from error
    return renamed


def _quantize(module: Any, arrays: Arrays, params: Parameters) -> dict[str, Layout]:
    """Quantize modules as their arrays are; expand those that the run or the class keeps plain."""
    shapes = {name: array.shape for name, array in named_arrays(module).items()}
    modules = dict(module.named_modules())
    packed: dict[str, Layout] = {}
    for path in [name.removesuffix(".scales") for name in arrays if name.endswith(".scales")]:
        if f"{path}.weight" not in shapes or f"{path}.weight" not in arrays:
            continue
        layout = _layout(path, arrays, shapes[f"{path}.weight"][-1])
        if params.expand or not hasattr(modules.get(path), "to_quantized"):
            scales, biases = arrays.pop(f"{path}.scales"), arrays.pop(f"{path}.biases", None)
            packed_weight = MLXWeight(layout, arrays[f"{path}.weight"], scales, biases)
            arrays[f"{path}.weight"] = packed_weight.dequantize(params.dtype)
        else:
            packed[path] = layout
    if packed:
        quantize(
            module,
            class_predicate=lambda path, _: packed[path].module_config if path in packed else False,
        )
    return packed


def _layout(path: str, arrays: Arrays, columns: int) -> Layout:
    """How a module is packed, by its shapes: its name may have changed."""
    weight, scales = arrays[f"{path}.weight"], arrays[f"{path}.scales"]
    group = columns // max(scales.shape[-1], 1)
    bits = weight.shape[-1] * 32 // columns
    if scales.dtype != mx.uint8 and bits in (2, 3, 4, 5, 6, 8) and group in (32, 64, 128):
        return affine(bits, group, str(scales.dtype).removeprefix("mlx.core."))
    for mode, form in FIXED_MODES.items():
        if scales.dtype == mx.uint8 and form == (group, bits):
            return fixed(mode)
    raise CheckpointError(
        f"{path} has codes {weight.shape} with scales {scales.shape}: packed in no way of MLX's "
        f"for rows of {columns}"
    )


# --- model ----------------------------------------------------------------------------------------

# What configs call the tokens that a model was trained to see at once.
_CONTEXT = (
    "max_position_embeddings", "model_max_length", "max_sequence_length", "max_seq_len",
    "seq_length", "n_positions", "n_ctx",
)  # fmt: skip
# Tokens, where a config names no limit: a state-space model has none.
_UNLIMITED = 1 << 20


class MLXLMModel:
    """A module of mlx-lm as a model that the engine runs (:class:`mlxrun.model.Model`).

    Attributes:
        promotes: whether logits come in a wider type than that of activations.
    """

    joint = False
    fused = False
    mapped = 0

    def __init__(
        self, module: Any, config: Config, dtype: mx.Dtype, unused: Sequence[str] = ()
    ) -> None:
        self.module, self._config, self.dtype = module, config, dtype
        self.unused = list(unused)
        self.nbytes = sum(int(array.nbytes) for array in named_arrays(module).values())
        # Two passes whose graph is built, not computed: logits' shape and dtype are known before.
        with _describing(config):
            caches = self.make_cache()
            for part in caches[0].parts:
                size = vars(part).get("max_size", vars(part).get("chunk_size", 1))
                if not isinstance(size, int) or size < 1:
                    raise ValueError(f"a layer that caches {size} tokens")
            self(mx.zeros((1, 3), mx.int32), caches)
            logits = self(mx.array([[0]]), caches)
        self.vocab_size = int(logits.shape[-1])
        self.promotes = logits.dtype != dtype

    def materialize(self) -> None:
        """Read all weights, so that a damaged file fails here, and compute one pass.

        What the classes keep besides their parameters (frequencies, masks) is lazy, and could be
        evaluated later by this thread only.
        """
        mx.eval(self.module.parameters())
        mx.eval(self(mx.array([[0]]), self.make_cache()))

    def check(self) -> None:
        """Nothing is mapped."""

    def damaged(self) -> list[str]:
        """Not known."""
        return []

    def __call__(
        self, tokens: mx.array, cache: Sequence[MLXLMCache], *, last_only: bool = False
    ) -> mx.array:
        """Logits (B, T, V) after tokens (B, T), or (B, 1, V) after the last."""
        (own,) = cache
        if last_only and tokens.shape[1] > 1:
            # The classes give logits of all tokens; those of the first pass are never computed.
            self._forward(tokens[:, :-1], own)
            own.compute_states()
            tokens = tokens[:, -1:]
        return self._forward(tokens, own)

    def forward(
        self, tokens: mx.array, cache: Sequence[MLXLMCache], select: mx.array | None = None
    ) -> mx.array:
        """Logits (T, V) after tokens (1, T), or (1, V) after the last, if one is selected."""
        return self(tokens, cache, last_only=select is not None)[0]

    def hidden(self, tokens: mx.array, cache: Sequence[MLXLMCache]) -> mx.array:
        """Logits: the classes give nothing else."""
        return self(tokens, cache)

    def head(self, x: mx.array) -> mx.array:
        return x

    def _forward(self, tokens: mx.array, own: MLXLMCache) -> mx.array:
        with own.step(tokens.shape[1]) as entries:
            logits: mx.array = self.module(tokens, cache=entries)
        return logits

    def make_cache(self, config: CacheConfig = DEFAULT_CACHE) -> list[MLXLMCache]:
        """An empty cache, one for the whole model."""
        if config.sparse is not None:
            raise CacheError(
                f"{self.summary.name} attends to all cached tokens",
                hint="Leave attention out, or give it a window",
            )
        if config.types != (None, None):
            raise CacheError(
                f"{self.summary.name} stores keys and values as they come",
                hint="Leave the types of the cache out",
            )
        entries = make_prompt_cache(self.module)
        window, keep = config.window, config.keep
        if window is None:
            return [MLXLMCache(entries)]
        self._check_forgets(window, keep)
        made = [_windowed(entry, window, lambda: WindowCache(window, keep)) for entry in entries]
        return [MLXLMCache(made)]

    def _check_forgets(self, window: int, keep: int) -> None:
        """Refuse windows where the class computes masks that no longer fit: tried, not computed."""
        empty = make_prompt_cache(self.module)
        small = [_windowed(entry, window, lambda: WindowCache(2, min(keep, 1))) for entry in empty]
        own = MLXLMCache(small)
        try:
            for tokens in (5, 1, 3):
                self._forward(mx.zeros((1, tokens), mx.int32), own)
        except ValueError as error:
            raise CacheError(
                f"{self.summary.family} cannot evict old tokens: mlx-lm's class needs them all",
                hint="Use a session without a window",
            ) from error

    @property
    def context_length(self) -> int:
        return self._number(*_CONTEXT) or _UNLIMITED

    @property
    def summary(self) -> ModelSummary:
        heads = self._number("num_attention_heads")
        return ModelSummary(
            str(self._config["model_type"]),
            len(self.module.layers),
            self._number("hidden_size", "d_model", "n_embd"),
            heads,
            self._number("num_key_value_heads") or heads,
            "mlx-lm",
        )

    def _number(self, *names: str) -> int:
        """The first of some keys that the config, or that of its text model, has; else 0."""
        text = self._config.get("text_config")
        for section in (text if isinstance(text, Mapping) else {}, self._config):
            for name in names:
                value = section.get(name)
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
        return 0

    def used_cache(self) -> MLXLMCache:
        """A cache after one token, which is not computed: shapes and dtypes are known."""
        (own,) = self.make_cache()
        self(mx.array([[0]]), [own])
        return own

    def footprint(self, here: Device) -> Footprint:
        """Bytes besides the weights: mlx-lm's caches, and a pass of a plain transformer's widths.

        The classes do not say what they compute, so their passes are estimated.
        """
        size = self.dtype.size
        hidden = self.summary.hidden_size
        inner = ("intermediate_size", "ffn_hidden_size", "d_inner")
        wide = max(self._number(name) for name in inner) or 4 * hidden
        stream = size * (_STREAMS * hidden + _INNER * wide)
        pair = 0 if here.fused_attention else size * self.summary.heads
        layers = tuple(_layer_footprint(part, stream, pair) for part in self.used_cache().parts)
        return Footprint(layers, SAMPLING * self.vocab_size, joint=self.joint)


# --- cache ----------------------------------------------------------------------------------------

_SIZES = ("max_size", "keep", "chunk_size")
_PAIR = ("keys", "values")
_KV = KVCache | RotatingKVCache | ChunkedKVCache
_TORN = "an interrupted pass has left this cache in pieces"


class MLXLMCache(base.KVCache):
    """mlx-lm's caches of all layers as one: of one sequence, never batched.

    They differ: some trim, some drop what lies behind a window, some hold a state that cannot be
    run backwards, not all count their tokens. So this class counts, and saves before each step of
    one token what undoing it needs.

    Args:
        entries: mlx-lm's caches, as its class wants them; owned from now on.
    """

    def __init__(self, entries: list[Any]) -> None:
        self.entries = entries
        self.offset = 0
        # What undoing the last step needs of each part, if that was of one token.
        self._before: list[dict[str, Any]] | None = None
        self._torn = False

    @property
    def parts(self) -> list[Any]:
        """The caches, those within lists of them included."""
        return [part for entry in self.entries for part in _flat(entry)]

    @contextmanager
    def step(self, tokens: int) -> Iterator[list[Any]]:
        """The entries for one forward pass over so many tokens."""
        if self._torn:
            raise CacheError(_TORN)
        self._before = [_undo(part) for part in self.parts] if tokens == 1 else None
        self._torn = True
        yield self.entries
        if tokens > 1:
            # States that are slices would hold on to what a whole pass computed.
            for part in self._states():
                part.cache = [each if each is None else mx.contiguous(each) for each in part.cache]
        self._torn = False
        self.offset += tokens

    def compute_states(self) -> None:
        """Queue recurrent states layer by layer.

        Asked for together they are computed last, and until then every layer holds what its own is
        made of.
        """
        for part in self._states():
            mx.async_eval(list(_arrays(part)))  # type: ignore[no-untyped-call]

    def _states(self) -> list[ArraysCache]:
        return [part for part in self.parts if isinstance(part, ArraysCache)]

    def truncate(self, row: int, n: int) -> None:
        assert row == 0, "a cache of one sequence"
        base.check_rollback(self.offset, n)
        if self._torn:
            self._restore_before()
        if n == 0:
            return
        if all(_can_trim(part, n) for part in self.parts):
            for part in self.parts:
                part.trim(n)
            self._before = None
        elif n == 1 and self._before is not None:
            self._restore_before()
        else:
            raise CacheError(f"the state of this model cannot go back {n} tokens")
        self.offset -= n

    @property
    def rollback(self) -> int:
        return 1

    def attend(self, *of_a_layer: object) -> mx.array:
        raise CacheError("mlx-lm's layers attend with caches of their own")

    def _restore_before(self) -> None:
        """Undo the last step of one token."""
        if self._before is None:
            raise CacheError(_TORN)
        for part, before in zip(self.parts, self._before, strict=True):
            vars(part).update(before)
        self._before, self._torn = None, False

    def fork(self) -> Self:
        # A deep copy of an MLX array is another handle to the same values: what one of the two
        # assigns to a slice stays its own.
        return copy.deepcopy(self)

    @property
    def layout_key(self) -> str:
        if not all(isinstance(part, _KV | ArraysCache) for part in self.parts):
            return ""
        return "; ".join(
            " ".join(
                [type(part).__name__]
                + [f"{name}={vars(part)[name]}" for name in _SIZES if name in vars(part)]
            )
            for part in self.parts
        )

    @property
    def batch_key(self) -> None:
        return None

    @property
    def sliceable(self) -> bool:
        return all(isinstance(part, KVCache) for part in self.parts)

    def slice_tokens(self, start: int, stop: int) -> Arrays:
        return {
            f"{i}.{name}": copied(getattr(part, name), start, stop)
            for i, part in enumerate(self.parts)
            if isinstance(part, KVCache) and part.keys is not None  # None: reads another layer's
            for name in _PAIR
        }

    def snapshot(self) -> base.State | None:
        if self.sliceable:
            return None
        arrays: Arrays = {}
        metadata = {
            str(i): {
                name: _to_json(value, arrays, f"{i}.{name}.") for name, value in vars(part).items()
            }
            for i, part in enumerate(self.parts)
            if not isinstance(part, KVCache)
        }
        return base.State(arrays, {"offset": self.offset, "parts": metadata})

    def restore(self, tokens: Sequence[Arrays], state: base.State | None, length: int) -> None:
        back = int(state.metadata["offset"]) - length if state else 0
        for i, part in enumerate(self.parts):
            if isinstance(part, KVCache):
                if f"{i}.keys" in tokens[0]:
                    for name in _PAIR:
                        setattr(part, name, joined(tokens, f"{i}.{name}", length, length))
                    part.offset = length
                continue
            assert state is not None
            for name, value in state.metadata["parts"][str(i)].items():
                setattr(part, name, _from_json(value, state.arrays))
            if back and not _can_trim(part, back):
                raise CacheError(f"the state of this model cannot go back {back} tokens")
            if back:
                part.trim(back)
        self.offset = length

    @property
    def state(self) -> list[mx.array]:
        return list(_arrays(self.entries))

    @property
    def nbytes(self) -> int:
        """Bytes allocated, those that undoing the last step needs included."""
        held = {id(array): array for array in _arrays([self.entries, self._before])}
        return sum(int(array.nbytes) for array in held.values())


def _flat(entry: Any) -> Iterator[Any]:
    if isinstance(entry, CacheList):
        for part in entry.caches:
            yield from _flat(part)
    else:
        yield entry


def _arrays(value: Any) -> Iterator[mx.array]:
    """All arrays within caches, of whatever class."""
    if isinstance(value, mx.array):
        yield value
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for part in value:
            yield from _arrays(part)
    elif isinstance(value, dict):
        yield from _arrays(list(value.values()))
    elif hasattr(value, "__dict__"):
        yield from _arrays(list(vars(value).values()))


def _can_trim(part: Any, n: int) -> bool:
    if isinstance(part, ChunkedKVCache):
        # Attention reaches back to the start of the chunk.
        position = part.offset - n
        return bool(position - position % part.chunk_size >= part.start_position)
    return bool(part.is_trimmable())


def _undo(part: Any) -> dict[str, Any]:
    """The attributes that undoing the coming step of one token restores."""
    if isinstance(part, KVCache | ChunkedKVCache):
        return {"offset": part.offset}  # what is behind the offset is not read
    if isinstance(part, RotatingKVCache) and part.offset < part.max_size:
        return {"offset": part.offset, "_idx": part._idx}
    if isinstance(part, ArraysCache):
        return {"cache": list(part.cache)}  # states are replaced, never written into
    # A full window is written into: with a second handle to its arrays, MLX copies them first, as
    # it does anyway while the step before is still being computed.
    return copy.deepcopy(vars(part))


def _to_json(value: Any, arrays: Arrays, prefix: str) -> Any:
    """A value as JSON has it, its arrays copied to ``arrays`` under names."""
    if isinstance(value, mx.array):
        name = f"{prefix}{len(arrays)}"
        # Rows of their own: a state may be a slice that holds on to a whole pass.
        arrays[name] = value[mx.arange(value.shape[0])] if value.ndim else mx.array(value)
        return {"array": name}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_to_json(part, arrays, prefix) for part in value]
    raise CacheError(f"a cache holds a {type(value).__name__}, which cannot be stored")


def _from_json(value: Any, arrays: Arrays) -> Any:
    if isinstance(value, dict):
        return mx.array(arrays[value["array"]])
    return [_from_json(part, arrays) for part in value] if isinstance(value, list) else value


# --- windows --------------------------------------------------------------------------------------


class WindowCache(RotatingKVCache):
    """mlx-lm's rotating cache, with masks that know of the first tokens that are kept.

    As in our own rotating cache, a query at position p attends to positions below ``keep`` and to
    those above ``p - window``, however many tokens come at once.
    """

    def __init__(self, window: int, keep: int) -> None:
        super().__init__(max_size=window + keep, keep=keep)  # type: ignore[no-untyped-call]

    def make_mask(
        self, n: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array | str | None:
        """What n new tokens attend to: None for all, ``"causal"``, or booleans (n, S)."""
        window, keep = self.max_size - self.keep, self.keep
        if window_size is not None and window_size < window:  # the layer's own window is narrower
            window, keep = window_size, 0
        new = np.arange(self.offset, self.offset + n)
        positions = np.concatenate([self._stored(), new]) if n > 1 else self._slots()
        p, j = new[:, None], positions[None, :]
        visible = (j <= p) & ((j < keep) | (j > p - window))
        if n == 1 and visible.all():
            return None
        if n > 1 and not return_array and self.offset + n <= window + keep:
            return "causal"
        return mx.array(visible)

    def _stored(self) -> np.ndarray:
        """Positions that a pass over many tokens finds stored, in order of time."""
        kept = min(self.keep, self.offset)
        rest = min(self.offset, self.max_size - 1) - kept  # one slot is the query's own
        return np.concatenate([np.arange(kept), np.arange(self.offset - rest, self.offset)])

    def _slots(self) -> np.ndarray:
        """Position in each slot once one more token is stored."""
        end = self.offset + 1
        if end <= self.max_size:
            return np.arange(end)
        ring = self.max_size - self.keep
        slot = self.keep if self._idx >= self.max_size else self._idx
        order = (np.arange(ring) - (slot - self.keep) - 1) % ring
        return np.concatenate([np.arange(self.keep), end - ring + order])


def _windowed(entry: Any, window: int, make: Callable[[], WindowCache]) -> Any:
    """An empty cache like an empty one of mlx-lm's, with a window of ``window`` tokens.

    States and narrower windows of a layer's own stay what they are.
    """
    if isinstance(entry, ArraysCache):
        return entry
    if isinstance(entry, CacheList):
        if sum(isinstance(part, KVCache) for part in entry.caches) > 1:
            raise CacheError("this model's layers have several caches each and cannot evict tokens")
        parts = (_windowed(part, window, make) for part in entry.caches)
        return CacheList(*parts)  # type: ignore[no-untyped-call]
    if isinstance(entry, RotatingKVCache | ChunkedKVCache):
        own = entry.max_size if isinstance(entry, RotatingKVCache) else entry.chunk_size
        if own <= window:
            return entry
    if isinstance(entry, KVCache | RotatingKVCache):
        return make()
    raise CacheError(
        f"some layers of this model have a {type(entry).__name__}, which cannot evict all "
        f"but {window} tokens"
    )


# --- adapters -------------------------------------------------------------------------------------

# A model of text and images has the text model as a part.
_PREFIXES = ("", "language_model.")


def adapt(model: Any, updates: Mapping[str, Sequence[LoRA]], dtype: mx.Dtype) -> None:
    """Wrap the modules that adapters change in mlx-lm's own layers for them."""
    modules = dict(model.named_modules())
    wrapped = []
    for name, changes in updates.items():
        path = next((p + name for p in _PREFIXES if p + name in modules), None)
        if path is None:
            raise AdapterError(
                f"{changes[0].origin}: the model has no such module", hint=OTHER_MODEL
            )
        wrapped.append((path, _adapted(path, modules[path], changes, dtype)))
    model.update_modules(tree_unflatten(wrapped))
    model.eval()


def _adapted(path: str, module: Any, updates: Sequence[LoRA], dtype: mx.Dtype) -> Any:
    from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear

    if any(update.magnitude is not None for update in updates):
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
    *leading, columns = module.weight.shape
    shape = (*leading, columns * 32 // module.bits if "scales" in module else columns)
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


# --- conversion -----------------------------------------------------------------------------------

NO_PLACE = "the model has no such parameter"


def conversion_plan(found: MLXLMClasses, config: dict[str, Any], weights: Weights) -> Plan:
    """How a directory is converted: the class renames its weights and says what it can quantize,
    what needs more bits (``quant_predicate``) and what keeps its type (``cast_predicate``).
    """
    model = found.module(config)
    modules = {
        path: module for path, module in model.named_modules() if hasattr(module, "to_quantized")
    }
    params = Parameters(weights.arrays, weights.layouts, mx.float32)
    arrays, needed, layouts = _matched(model, params)
    renamed = Weights(arrays, layouts, skipped=weights.skipped)
    for name in sorted(set(arrays) - needed):
        renamed.skip(name, NO_PLACE)
    predicate = getattr(model, "quant_predicate", None)

    def form(module: str, asked: Layout) -> Layout | None:
        if module not in modules:
            return None
        own = True if predicate is None else predicate(module, modules[module])
        if isinstance(own, dict) and asked.bits < own["bits"]:
            return affine(int(own["bits"]), int(own.get("group_size", 64)))
        return asked if own else None

    cast = getattr(model, "cast_predicate", lambda name: True)
    return Plan(config, renamed, form, lambda name: not cast(name))


# --- footprint ------------------------------------------------------------------------------------

# mlx-lm's caches grow by so many tokens.
_STEP = 256
# Arrays of the stream's and of the feed-forward's width in a layer of a pass.
_STREAMS, _INNER = 22, 4


def _window_of(part: Any) -> int | None:
    if isinstance(part, RotatingKVCache):
        return int(part.max_size)
    return int(part.chunk_size) if isinstance(part, ChunkedKVCache) else None


def _layer_footprint(part: Any, stream: int, pair: int) -> LayerFootprint:
    if not isinstance(part, _KV):  # a state never grows
        nbytes = sum(int(array.nbytes) for array in _arrays(part))
        return LayerFootprint(fixed=nbytes, twice=True, stream=stream)
    # A layer that reads another's has none.
    kept = [array for array in (part.keys, part.values) if array is not None]
    return LayerFootprint(
        token=sum(int(a.shape[1] * a.shape[3]) * a.itemsize for a in kept),  # (B, H, T, D)
        window=_window_of(part),
        twice=isinstance(part, RotatingKVCache),  # only a ring is written over
        step=_STEP,
        stream=stream,
        pair=pair,
    )
