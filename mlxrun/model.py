"""The contract between the engine and a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import mlx.core as mx

from mlxrun.config import DEFAULT_CACHE, CacheConfig
from mlxrun.kv_cache.base import KVCache

M = TypeVar("M", bound=KVCache)


@dataclass(frozen=True)
class ModelSummary:
    """A model in a few words and numbers.

    Attributes:
        family: ``model_type`` of its config.
        layers, hidden_size: blocks, and the width of the stream between them; 0 if not known.
        heads, kv_heads: of the first layer that attends; 0 for none.
        through: the library whose class runs it; empty for ours.
    """

    family: str
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    through: str = ""

    @property
    def name(self) -> str:
        """The family, and through which library it runs."""
        return f"{self.family} through {self.through}" if self.through else self.family


@dataclass(frozen=True)
class WeightStorage:
    """How this machine stores the weights of a model, by the headers of its files.

    Attributes:
        nbytes: of all weights.
        dtype: of activations, such as ``float32``.
        packed: some matrices are in MLX's quantized layouts.
        how: in a few words, to be printed.
        modules: bytes by module, as the source names it.
        mapped: bytes that are pages of the file, shared by all processes that map it.
        fused: the CPU kernels of this package compute the layers.
        reason: how and why, with the options that change it.
        native: these kernels multiply with the matrices as they are stored.
        missed: why kernels are missing that could multiply its GGUF blocks; else None.
    """

    nbytes: int
    dtype: str
    packed: bool
    how: str
    modules: Mapping[str, float] = field(default_factory=dict, repr=False)
    mapped: int = 0
    fused: bool = False
    reason: str = ""
    native: bool = False
    missed: str | None = None


class Model(Protocol[M]):
    """Immutable weights and a forward pass; all state is in KV caches.

    Attributes:
        vocab_size: logits of a token.
        context_length: tokens the model was trained to see at once.
        dtype: of activations.
        nbytes: of all weights.
        fused: whether the kernels of this package compute its layers.
        mapped: bytes among them that are pages of a file, which the system can drop and read again.
        summary: its family and sizes.
        joint: whether tokens of several sequences may share a pass; the engine batches them.
    """

    joint: bool
    dtype: mx.Dtype
    nbytes: int
    mapped: int
    fused: bool

    @property
    def vocab_size(self) -> int: ...

    @property
    def context_length(self) -> int: ...

    @property
    def summary(self) -> ModelSummary: ...

    def __call__(
        self, tokens: mx.array, cache: Sequence[M], *, last_only: bool = False
    ) -> mx.array:
        """Logits (B, T, V) after tokens (B, T), or (B, 1, V) after the last; advances ``cache``."""

    def forward(
        self, tokens: mx.array, cache: Sequence[M], select: mx.array | None = None
    ) -> mx.array:
        """Logits (N, V) of tokens (B, T), B * T = N, or of those selected; advances ``cache``.

        A model that is not ``joint`` takes one row, and selects only the last token.
        """

    def hidden(self, tokens: mx.array, cache: Sequence[M]) -> mx.array:
        """The stream (B, T, hidden) after all layers; advances ``cache``."""

    def head(self, x: mx.array) -> mx.array:
        """Logits (..., V) of the stream (..., hidden)."""

    def make_cache(self, config: CacheConfig = DEFAULT_CACHE) -> list[M]:
        """Empty caches, for ``__call__``.

        Raises:
            CacheError: the model cannot evict tokens, or stores keys and values in its own way.
            ParameterError: no such type, or none that fits the model.
        """

    def check(self) -> None:
        """See to it that mapped files are whole; called wherever results are read.

        Raises:
            GGUFError: one has been cut short, and results since then are wrong.
        """

    def damaged(self) -> list[str]:
        """Tensors with weights that are no finite numbers, as far as files tell; reads them all."""
