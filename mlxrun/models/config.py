"""ModelConfig: a decoder as frozen data.

A family (``families.py``) turns a Hugging Face ``config.json`` into a :class:`ModelConfig`; the
transformer reads nothing else. Families differ in these values alone, per layer where models
differ per layer; names are those of the checkpoint's parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlxrun.kv_cache.options import Shape


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al., 2021, arXiv:2104.09864).

    Attributes:
        dims: leading dimensions of a head that are rotated.
        base: theta.
        scale: multiplies positions (linear scaling: 1 / factor).
        factors: divisors of the inverse frequencies, ``dims / 2`` numbers, or None.
        traditional: rotate neighbors (2i, 2i+1) instead of halves (i, i + dims/2).
        attention_factor: multiplies the rotated dimensions of queries and keys (YaRN's mscale).
    """

    dims: int
    base: float = 10000.0
    scale: float = 1.0
    factors: tuple[float, ...] | None = None
    traditional: bool = False
    attention_factor: float = 1.0


@dataclass(frozen=True)
class Norm:
    """Normalization over the last axis; a bias is added where the weights have one.

    Attributes:
        kind: ``rms`` (Zhang and Sennrich, 2019, arXiv:1910.07467) or ``layer`` (Ba et al., 2016,
            arXiv:1607.06450).
        eps: added to the variance.
        offset: added to the stored weight when it is loaded.
        bare: without weights.
    """

    kind: str = "rms"
    eps: float = 1e-6
    offset: float = 0.0
    bare: bool = False


@dataclass(frozen=True)
class Temperature:
    """Scales the query at position p by ``1 + scale * log(1 + floor(p / length))`` (Llama 4)."""

    scale: float
    length: int


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention (Ainslie et al., 2023, arXiv:2305.13245).

    Attributes:
        heads: query heads, a multiple of ``kv_heads``.
        scale: of the scores.
        rope: None for a layer without positions.
        window: attend to the last ``window`` tokens only, or None for all.
        qk_norm: normalize queries and keys: per ``head``, ``each`` head by weights of its own, the
            ``whole`` projection, a head ``after_rope`` (the others: before), or not at all (None).
        norms: names of the norms of queries and of keys.
        clip: bound of queries, keys and values, or None.
        alibi: linear biases by distance (ALiBi; Press et al., 2022, arXiv:2108.12409): the
            exponent of the steepest slope, 8 in the paper, or None.
        softcap: bound of the scores, by tanh, or None.
        temperature: scale of the queries by position, or None.
        sinks: each head has a learned attention sink (gpt-oss).
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
        """Shape of a token's K/V in the cache."""
        return Shape(self.kv_heads, self.head_dim, self.head_dim)


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434).

    The cache has the compressed K/V, and one rotated key for all heads.

    Attributes:
        heads: query heads.
        qk_nope_head_dim: width of a query head without its rotated part.
        v_head_dim: width of a value head.
        kv_lora_rank: width of the compressed keys and values.
        q_lora_rank: width of the compressed queries; None for uncompressed ones.
        scale: of the scores.
        rope: of the rotated part; its ``dims`` are all of ``qk_rope_head_dim``.
    """

    heads: int
    qk_nope_head_dim: int
    v_head_dim: int
    kv_lora_rank: int
    q_lora_rank: int | None
    scale: float
    rope: Rope
    window: int | None = None
    alibi: float | None = None

    @property
    def head_dim(self) -> int:
        """Width of a query head."""
        return self.qk_nope_head_dim + self.rope.dims

    @property
    def kv_heads(self) -> int:
        return 1

    @property
    def cache_shape(self) -> Shape:
        """Shape of a token's rotated key and, as its value, compressed K/V."""
        return Shape(1, self.rope.dims, self.kv_lora_rank, latent=True)


@dataclass(frozen=True)
class FeedForward:
    """``down(act(gate(x)) * up(x))`` (Shazeer, 2020, arXiv:2002.05202), or without a gate.

    Attributes:
        size: width between the projections.
        activation: see ``functions.ACTIVATIONS``.
        names: of the projections: gate, up and down, or up and down without a gate.
        fused: gate and up are one projection; ``names`` has that and down.
    """

    size: int
    activation: str = "silu"
    names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    fused: bool = False


@dataclass(frozen=True)
class Experts:
    """A mixture of experts (MoE): each token is routed to a few of many gated feed-forwards.

    Attributes:
        count, used: experts in all, and per token.
        size: width of an expert.
        router, experts: names of the router and of the stacked experts.
        gating: router logits to weights: ``softmax`` over all experts, ``softmax_topk`` over the
            selected ones, or ``sigmoid`` of each.
        normalize: make the weights of the selected experts sum to one.
        scale: multiplies the weights.
        bias: name of a bias on the weights that affects the selection only, or None.
        groups, used_groups: groups of experts, and how many of the best groups are considered.
        activation: of the gate; see ``functions.GATES``.
        shared: the shared experts, as one feed-forward for every token, or None.
        shared_name: name of the shared experts.
        shared_gate: name of the gate of the shared experts, or None.
    """

    count: int
    used: int
    size: int
    router: str = "gate"
    experts: str = "switch_mlp"
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
        residual: multiplies each sublayer's output.
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
        family: its ``model_type``; for display, never for decisions.
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        norm: every norm of the model.
        tied: the output head is the embedding.
        context_length: tokens the model was trained for.
        final_norm: name of the last norm.
        positions: name of a learned embedding of positions, or None.
        embedding_norm: name of a norm on embeddings, or None.
        embedding_scale, logit_scale: multiply embeddings and logits.
        logit_softcap: bound of the logits, by tanh, or None.
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
