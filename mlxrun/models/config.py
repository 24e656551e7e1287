"""What a transformer is made of, as frozen values.

A family (``families.py``) turns a Hugging Face ``config.json`` into a :class:`ModelConfig`; the
transformer reads nothing else. Every difference between families is a value here, per layer where
models differ per layer.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al., 2021, arXiv:2104.09864).

    Attributes:
        dims: how many leading dimensions of a head are rotated.
        base: base of the geometric progression of wavelengths.
        scale: positions are multiplied by this (linear scaling: 1 / factor).
        factors: what each inverse frequency is divided by, ``dims / 2`` numbers, or None.
        traditional: rotate neighbours (2i, 2i+1) instead of halves (i, i + dims/2).
    """

    dims: int
    base: float = 10000.0
    scale: float = 1.0
    factors: tuple[float, ...] | None = None
    traditional: bool = False


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention (Ainslie et al., 2023, arXiv:2305.13245).

    Attributes:
        heads: query heads, a multiple of ``kv_heads``.
        kv_heads: key and value heads.
        head_dim: width of a head.
        scale: of the products of queries and keys.
        rope: positions, or None for a layer without.
        window: attend to the last ``window`` tokens only, or None for all.
        qk_norm: RMS-normalise each head of the queries and keys before the rotation.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None
    window: int | None = None
    qk_norm: bool = False


@dataclass(frozen=True)
class FeedForward:
    """A gated feed-forward block: ``down(act(gate(x)) * up(x))`` (Shazeer, 2020, arXiv:2002.05202).

    Attributes:
        size: width between the projections.
        activation: name of the gate's activation.
    """

    size: int
    activation: str = "silu"


@dataclass(frozen=True)
class Layer:
    """One block: attention and feed-forward, each after a norm, each added to its input."""

    attention: Attention
    feed_forward: FeedForward


@dataclass(frozen=True)
class ModelConfig:
    """A whole decoder.

    Attributes:
        family: ``model_type`` it came from; for display, never for decisions.
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        layers: one entry per block.
        norm_eps: epsilon of every RMS norm.
        tied: the output head is the embedding.
        context_length: tokens the model was trained for.
    """

    family: str
    vocab_size: int
    hidden_size: int
    layers: tuple[Layer, ...]
    norm_eps: float
    tied: bool
    context_length: int
