"""A model class of mlx-lm as a model that the engine runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from mlxrun.errors import CheckpointError
from mlxrun.loading.fallback.memory import ForeignMemory
from mlxrun.loading.fallback.registry import arguments
from mlxrun.loading.fallback.weights import fill, named_arrays
from mlxrun.models.base import Summary
from mlxrun.weights.parameters import Parameters

# Tokens, where a config names no limit: a state-space model has none.
_UNLIMITED = 1 << 20


class ForeignModel:
    """A module of mlx-lm with its weights.

    Args:
        module: mlx-lm's ``Model``, filled.
        config: ``config.json``.
        dtype: of activations.
    """

    def __init__(self, module: Any, config: Mapping[str, Any], dtype: mx.Dtype) -> None:
        self._module, self._config, self.dtype = module, config, dtype
        self.nbytes = sum(int(array.nbytes) for array in named_arrays(module).values())
        self.vocab_size = int(self._probe().shape[-1])

    def _probe(self) -> mx.array:
        """The logits of a token, not computed: their shape and dtype are known before."""
        return self(mx.array([[0]]), self.make_cache())

    def __call__(
        self, tokens: mx.array, cache: Sequence[ForeignMemory], *, last_only: bool = False
    ) -> mx.array:
        """Logits (B, T, V) after tokens (B, T), or (B, 1, V) after the last."""
        (memory,) = cache
        if last_only and tokens.shape[1] > 1:
            # The classes give logits of all tokens; those of the first pass are never computed.
            self._forward(tokens[:, :-1], memory)
            tokens = tokens[:, -1:]
        return self._forward(tokens, memory)

    def _forward(self, tokens: mx.array, memory: ForeignMemory) -> mx.array:
        with memory.step(tokens.shape[1]) as entries:
            logits: mx.array = self._module(tokens, cache=entries)
        return logits

    def make_cache(self, *, window: int | None = None, keep: int = 0) -> list[ForeignMemory]:
        """An empty memory, the only one of the model."""
        return [ForeignMemory(make_prompt_cache(self._module))]

    @property
    def context_length(self) -> int:
        names = ("max_position_embeddings", "max_sequence_length", "max_seq_len", "n_positions")
        found = [self._number(name) for name in names]
        return next((length for length in found if length), _UNLIMITED)

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
    """
    module = empty_module(classes, config)
    unused = fill(module, params)
    mx.eval(module.parameters())
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
