"""A model class of mlx-lm as a model that the engine runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchLinear

from mlxrun.cache.sparsity import Sparse
from mlxrun.errors import CacheError, CheckpointError, ParameterError
from mlxrun.kernels.device import device
from mlxrun.loading.fallback import kept
from mlxrun.loading.fallback.memory import ForeignMemory
from mlxrun.loading.fallback.registry import arguments
from mlxrun.loading.fallback.weights import fill, named_arrays
from mlxrun.loading.fallback.window import WindowCache, windowed
from mlxrun.model import Summary
from mlxrun.weights.parameters import Parameters

T = TypeVar("T")

# What configs call the tokens that a model was trained to see at once.
_CONTEXT = (
    "max_position_embeddings", "model_max_length", "max_sequence_length", "max_seq_len",
    "seq_length", "n_positions", "n_ctx",
)  # fmt: skip
# Tokens, where a config names no limit: a state-space model has none.
_UNLIMITED = 1 << 20


class ForeignModel:
    """A module of mlx-lm with its weights.

    Args:
        module: mlx-lm's ``Model``, filled.
        config: ``config.json``.
        dtype: of activations.
    """

    joint = False
    fused = False
    mapped = 0

    def __init__(self, module: Any, config: Mapping[str, Any], dtype: mx.Dtype) -> None:
        self._module, self._config, self.dtype = module, config, dtype
        self.nbytes = sum(int(array.nbytes) for array in named_arrays(module).values())
        # Logits that are never computed: their shape and dtype are known before.
        logits = self._tried()
        self.vocab_size = int(logits.shape[-1])
        self.promotes = logits.dtype != dtype

    def _tried(self) -> mx.array:
        """Two passes; what a class raises on odd values becomes one of our errors."""
        try:
            memory = self.make_cache()
            for part in kept.parts(memory[0].entries):
                kept.check_window(part)
            self(mx.zeros((1, 3), mx.int32), memory)
            return self(mx.array([[0]]), memory)
        except Exception as error:
            raise CheckpointError(
                f"config.json does not describe a {str(self._config['model_type'])[:80]}: {error}"
            ) from error

    def materialise(self) -> None:
        """Read all weights: a damaged file must fail here, not at the first token.

        And compute once: what the classes keep besides their parameters (frequencies, masks) is
        lazy, and could be evaluated later by this thread only.
        """
        mx.eval(self._module.parameters())
        mx.eval(self(mx.array([[0]]), self.make_cache()))

    def check(self) -> None:
        """Nothing is mapped."""

    def damaged(self) -> list[str]:
        """Not known."""
        return []

    def __call__(
        self, tokens: mx.array, cache: Sequence[ForeignMemory], *, last_only: bool = False
    ) -> mx.array:
        """Logits (B, T, V) after tokens (B, T), or (B, 1, V) after the last."""
        (memory,) = cache
        if last_only and tokens.shape[1] > 1:
            # The classes give logits of all tokens; those of the first pass are never computed.
            self._forward(tokens[:, :-1], memory)
            memory.compute_states()
            tokens = tokens[:, -1:]
        return self._forward(tokens, memory)

    def _forward(self, tokens: mx.array, memory: ForeignMemory) -> mx.array:
        with memory.step(tokens.shape[1]) as entries:
            logits: mx.array = self._module(tokens, cache=entries)
        return logits

    def make_cache(
        self,
        *,
        window: int | None = None,
        keep: int = 0,
        keys: str | None = None,
        values: str | None = None,
        sparse: Sparse | None = None,
    ) -> list[ForeignMemory]:
        """An empty memory, the only one of the model.

        Raises:
            CacheError: a window is wanted, and the class cannot do with less than all tokens; or
                keys or values of some type, or a sparse pattern.
        """
        if sparse is not None:
            raise CacheError(
                f"{self.summary.name} attends to all that it remembers",
                hint="Leave attention out, or give it a window",
            )
        if keys is not None or values is not None:
            raise CacheError(
                f"{self.summary.name} stores keys and values as they come",
                hint="Leave the types of the cache out",
            )
        entries = make_prompt_cache(self._module)
        if window is None:
            return [ForeignMemory(entries)]
        self._check_forgets(window, keep)
        made = [windowed(entry, window, lambda: WindowCache(window, keep)) for entry in entries]
        return [ForeignMemory(made)]

    def _check_forgets(self, window: int, keep: int) -> None:
        """Refuse windows where the class computes masks that no longer fit: tried, not computed."""
        empty = make_prompt_cache(self._module)
        small = [windowed(entry, window, lambda: WindowCache(2, min(keep, 1))) for entry in empty]
        memory = ForeignMemory(small)
        try:
            for tokens in (5, 1, 3):
                self._forward(mx.zeros((1, tokens), mx.int32), memory)
        except ValueError as error:
            raise CacheError(
                f"{self.summary.family} cannot forget old tokens: mlx-lm's class needs them all",
                hint="Use a session without a window",
            ) from error

    @property
    def module(self) -> Any:
        """mlx-lm's module."""
        return self._module

    @property
    def context_length(self) -> int:
        return self._number(*_CONTEXT) or _UNLIMITED

    @property
    def summary(self) -> Summary:
        heads = self._number("num_attention_heads")
        return Summary(
            str(self._config["model_type"]),
            len(self._module.layers),
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


def build_foreign(
    classes: tuple[Any, Any], config: Mapping[str, Any], params: Parameters
) -> tuple[ForeignModel, list[str]]:
    """mlx-lm's class over a checkpoint's weights, and the names that it has no place for.

    Args:
        classes: ``Model`` and ``ModelArgs``, as :func:`registry.classes` gives them.

    Raises:
        CheckpointError: config and weights do not make a model of that class.
        AdapterError: an adapter does not fit that model.
    """
    made, unused = unpromoted(lambda precise: _filled(classes, config, params, precise=precise))
    made.materialise()
    return made, unused


def unpromoted(make: Callable[[bool], tuple[ForeignModel, T]]) -> tuple[ForeignModel, T]:
    """The model that is made precisely, unless only one that is not computes in its own dtype.

    Some classes let one float32 parameter make all that follows float32, at twice the cost.

    Args:
        make: given whether the rates of state-space layers stay in float32; gives a model and
            what comes with it.
    """
    made = make(True)
    if not made[0].promotes:
        return made
    plain = make(False)
    return made if plain[0].promotes else plain


def _filled(
    classes: tuple[Any, Any], config: Mapping[str, Any], params: Parameters, *, precise: bool
) -> tuple[ForeignModel, list[str]]:
    module = empty_module(classes, config)
    unused = fill(module, params, precise=precise)
    if params.updates:
        from mlxrun.loading.fallback.adapters import adapt

        adapt(module, params.updates, params.dtype)
    plain = any(isinstance(part, SwitchLinear) for part in module.modules())
    if plain and not device().gathers_halves and params.dtype != mx.float32:
        name = str(params.dtype).removeprefix("mlx.core.")
        raise ParameterError("dtype", name, "float32: MLX's CPU computes plain experts in no other")
    return ForeignModel(module, config, params.dtype), unused


def empty_module(classes: tuple[Any, Any], config: Mapping[str, Any]) -> Any:
    """mlx-lm's module of a config, without the weights of a checkpoint.

    Raises:
        CheckpointError: the class cannot be built of such a config.
    """
    model, args = classes
    parsed = arguments(args, config)
    try:
        return model(parsed)
    except Exception as error:  # whatever a class raises on odd values
        raise CheckpointError(
            f"config.json does not describe a {str(config.get('model_type'))[:80]}: {error}"
        ) from error
