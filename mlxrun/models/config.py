"""What a transformer is made of, as frozen values.

A family (``families.py``) turns a Hugging Face ``config.json`` into a :class:`ModelConfig`; the
transformer reads nothing else. Every difference between families is a value here, per layer where
models differ per layer; names are those of the checkpoint's parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlxrun.cache.types import Shape


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al., 2021, arXiv:2104.09864).

    Attributes:
        dims: how many leading dimensions of a head are rotated.
        base: base of the geometric progression of wavelengths.
        scale: positions are multiplied by this (linear scaling: 1 / factor).
        factors: what each inverse frequency is divided by, ``dims / 2`` numbers, or None.
        traditional: rotate neighbours (2i, 2i+1) instead of halves (i, i + dims/2).
        sharpening: what the rotated dimensions of queries and of keys are multiplied by.
    """

    dims: int
    base: float = 10000.0
    scale: float = 1.0
    factors: tuple[float, ...] | None = None
    traditional: bool = False
    sharpening: float = 1.0


@dataclass(frozen=True)
class Norm:
    """A normalisation over the last axis; a bias is added where the weights have one.

    Attributes:
        kind: ``rms`` (Zhang and Sennrich, 2019, arXiv:1910.07467) or ``layer`` (Ba et al., 2016,
            arXiv:1607.06450).
        eps: added to the variance.
        offset: added to the stored weight when it is loaded.
        bare: there are no weights.
    """

    kind: str = "rms"
    eps: float = 1e-6
    offset: float = 0.0
    bare: bool = False


@dataclass(frozen=True)
class Temperature:
    """Sharper queries at later positions p: ``1 + scale * log(1 + floor(p / length))``."""

    scale: float
    length: int


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
        qk_norm: normalise queries and keys: each ``head``, ``each`` by weights of its own or the
            ``whole`` projection before the rotation, a head once ``turned``, or not at all (None).
        norms: names of the norms of queries and of keys.
        clip: bound queries, keys and values to this, or None.
        alibi: lower scores by distance, each head by its own slope (Press et al., 2022,
            arXiv:2108.12409); this is the exponent of the steepest one, 8 there, or None.
        softcap: bound scores to this by tanh, or None.
        temperature: scale of the queries by position, or None.
        sinks: each head may also attend to nothing, at a learnt score (gpt-oss).
        fused: queries, keys and values come from one projection, ``qkv_proj``.
        out: name of the output projection.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None
    window: int | None = None
    qk_norm: str | None = None
    norms: tuple[str, str] = ("q_norm", "k_norm")
    clip: float | None = None
    alibi: float | None = None
    softcap: float | None = None
    temperature: Temperature | None = None
    sinks: bool = False
    fused: bool = False
    out: str = "o_proj"

    @property
    def cache_shape(self) -> Shape:
        """What a token leaves in the cache."""
        return Shape(self.kv_heads, self.head_dim, self.head_dim)


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): the cache holds what keys and
    values are made from, and one rotated key for all heads.

    Attributes:
        heads: query heads.
        head_dim: width of a query head without the part that turns.
        value_dim: width of a value head.
        latent: width of what keys and values are made from.
        query_latent: width of what queries are made from; None if directly from the stream.
        scale: of the products of queries and keys.
        rope: of the part that turns.
    """

    heads: int
    head_dim: int
    value_dim: int
    latent: int
    query_latent: int | None
    scale: float
    rope: Rope
    window: int | None = None
    alibi: float | None = None

    @property
    def kv_heads(self) -> int:
        return 1

    @property
    def cache_shape(self) -> Shape:
        """What a token leaves in the cache: a key that turns, and the latent as a value."""
        return Shape(1, self.rope.dims, self.latent, latent=True)


@dataclass(frozen=True)
class FeedForward:
    """``down(act(gate(x)) * up(x))`` (Shazeer, 2020, arXiv:2002.05202), or without a gate.

    Attributes:
        size: width between the projections.
        activation: name of the activation; see ``transformer.ACTIVATIONS``.
        names: of the projections: gate, up and down; or up and down without a gate.
        fused: gate and up are one projection, named first, and ``names`` has that and down.
    """

    size: int
    activation: str = "silu"
    names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    fused: bool = False


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: each token goes through a few of many gated feed-forwards.

    Attributes:
        count, used: experts in all, and for one token.
        size: width of an expert.
        router, switch: names of the router and of the stacked experts.
        gating: how router logits become weights: ``softmax`` over all experts, ``sigmoid`` of each,
            or ``chosen`` (softmax over those chosen).
        normalize: let the weights of the chosen sum to one.
        scale: what the weights are multiplied by.
        bias: name of what is added to the weights for choosing only, or None.
        groups, used_groups: experts are in groups, of which the best are considered.
        activation: of the gate; see ``functions.GATES``.
        shared: a feed-forward that every token goes through as well, or None.
        shared_name: where its weights are.
        shared_gate: name of a gate on it, or None.
    """

    count: int
    used: int
    size: int
    router: str = "gate"
    switch: str = "switch_mlp"
    gating: str = "softmax"
    normalize: bool = True
    scale: float = 1.0
    bias: str | None = None
    groups: int = 1
    used_groups: int = 1
    activation: str = "silu"
    shared: FeedForward | None = None
    shared_name: str = "shared_expert"
    shared_gate: str | None = None


@dataclass(frozen=True)
class Layer:
    """One block: attention and feed-forward, each with norms around it, added to the stream.

    Attributes:
        mlp: name of the feed-forward.
        before_attention, after_attention, before_feed_forward, after_feed_forward: names of the
            norms there, or None for none.
        parallel: both sublayers read the block's input, instead of one after the other.
        residual: what each sublayer's output is multiplied by.
    """

    attention: Attention | LatentAttention
    feed_forward: FeedForward | Experts
    mlp: str = "mlp"
    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_feed_forward: str | None = "post_attention_layernorm"
    after_feed_forward: str | None = None
    parallel: bool = False
    residual: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """A whole decoder.

    Attributes:
        family: ``model_type`` it came from; for display, never for decisions.
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        layers: one entry per block.
        norm: every norm of the model.
        tied: the output head is the embedding.
        context_length: tokens the model was trained for.
        final_norm: name of the last norm.
        positions: name of a learnt embedding of positions, or None.
        embedding_norm: name of a norm on embeddings, or None.
        embedding_scale, logit_scale: what embeddings and logits are multiplied by.
        logit_softcap: bound logits to this by tanh, or None.
    """

    family: str
    vocab_size: int
    hidden_size: int
    layers: tuple[Layer, ...]
    norm: Norm
    tied: bool
    context_length: int
    final_norm: str = "norm"
    positions: str | None = None
    embedding_norm: str | None = None
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
