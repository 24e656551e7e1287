"""ModelConfig: a decoder as frozen data.

The transformer reads nothing else: families differ in these values alone, per layer where models
differ per layer. Names are those of the checkpoint's parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlxrun.kv_cache.options import Shape


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al., 2021, arXiv:2104.09864)."""

    dims: int  # leading dimensions of a head that are rotated
    base: float = 10000.0  # theta
    scale: float = 1.0  # of positions (linear scaling: 1 / factor)
    factors: tuple[float, ...] | None = None  # divisors of the inverse frequencies, (dims / 2,)
    traditional: bool = False  # rotate neighbors (2i, 2i+1) instead of halves (i, i + dims/2)
    attention_factor: float = 1.0  # of the rotated dimensions of queries and keys (YaRN's mscale)


@dataclass(frozen=True)
class Norm:
    """Normalization over the last axis; a bias is added where the weights have one.

    Attributes:
        kind: ``rms`` (Zhang and Sennrich, 2019, arXiv:1910.07467) or ``layer`` (Ba et al., 2016,
            arXiv:1607.06450).
    """

    kind: str = "rms"
    eps: float = 1e-6  # added to the variance
    offset: float = 0.0  # added to the stored weight when it is loaded
    bare: bool = False  # without weights


@dataclass(frozen=True)
class Temperature:
    """Scales the query at position p by ``1 + scale * log(1 + floor(p / length))`` (Llama 4)."""

    scale: float
    length: int


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention (Ainslie et al., 2023, arXiv:2305.13245).

    Attributes:
        qk_norm: normalize queries and keys: per ``head``, ``each`` head by weights of its own, the
            ``whole`` projection, a head ``after_rope`` (the others: before), or not at all (None).
        alibi: linear biases by distance (ALiBi; Press et al., 2022, arXiv:2108.12409): the
            exponent of the steepest slope, 8 in the paper, or None.
    """

    heads: int  # of queries, a multiple of kv_heads
    kv_heads: int
    head_dim: int
    scale: float  # of the scores
    rope: Rope | None  # None for a layer without positions
    window: int | None = None  # attend to so many of the last tokens only
    qk_norm: str | None = None
    norms: tuple[str, str] = ("q_norm", "k_norm")  # names
    clip: float | None = None  # bound of queries, keys and values
    alibi: float | None = None
    softcap: float | None = None  # bound of the scores, by tanh
    temperature: Temperature | None = None  # scale of the queries by position
    sinks: bool = False  # each head has a learned attention sink (gpt-oss)
    fused: bool = False  # queries, keys and values come from one projection, qkv_proj
    out: str = "o_proj"  # name of the output projection

    @property
    def cache_shape(self) -> Shape:
        """Shape of a token's K/V in the cache."""
        return Shape(self.kv_heads, self.head_dim, self.head_dim)


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434).

    The cache has the compressed K/V, and one rotated key for all heads.
    """

    heads: int  # of queries
    qk_nope_head_dim: int  # width of a query head without its rotated part
    v_head_dim: int
    kv_lora_rank: int  # width of the compressed keys and values
    q_lora_rank: int | None  # width of the compressed queries; None for uncompressed ones
    scale: float  # of the scores
    rope: Rope  # of the rotated part, all qk_rope_head_dim of it
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
        names: of the projections: gate, up and down; up and down without a gate; or the fused gate
            and up, and down.
    """

    size: int  # width between the projections
    activation: str = "silu"  # see functions.ACTIVATIONS
    names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    fused: bool = False  # gate and up are one projection


@dataclass(frozen=True)
class Experts:
    """A mixture of experts (MoE): each token is routed to a few of many gated feed-forwards.

    Attributes:
        gating: router logits to weights: ``softmax`` over all experts, ``softmax_topk`` over the
            selected ones, or ``sigmoid`` of each.
        bias: name of a bias on the weights that affects the selection only, or None.
        shared: the shared experts, as one feed-forward for every token, or None.
    """

    count: int  # experts in all
    used: int  # experts per token
    size: int  # width of an expert
    router: str = "gate"  # name
    experts: str = "switch_mlp"  # name of the stacked experts
    gating: str = "softmax"
    normalize: bool = True  # make the weights of the selected experts sum to one
    scale: float = 1.0  # of the weights
    bias: str | None = None
    groups: int = 1  # of experts
    used_groups: int = 1  # so many of the best groups are considered
    activation: str = "silu"  # of the gate; see functions.GATES
    shared: FeedForward | None = None
    shared_name: str = "shared_expert"
    shared_gate: str | None = None  # name


@dataclass(frozen=True)
class Layer:
    """One block: attention and feed-forward, each with norms around it, added to the stream."""

    attention: Attention | LatentAttention
    feed_forward: FeedForward | Experts
    mlp: str = "mlp"  # name of the feed-forward
    before_attention: str | None = "input_layernorm"  # names of norms, or None for none
    after_attention: str | None = None
    before_feed_forward: str | None = "post_attention_layernorm"
    after_feed_forward: str | None = None
    parallel: bool = False  # both sublayers read the block's input
    residual: float = 1.0  # of each sublayer's output


@dataclass(frozen=True)
class ModelConfig:
    """A whole decoder."""

    family: str  # its model_type; for display, never for decisions
    vocab_size: int  # rows of the embedding
    hidden_size: int  # width of the residual stream
    layers: tuple[Layer, ...]
    norm: Norm  # every norm of the model
    tied: bool  # the output head is the embedding
    context_length: int  # tokens the model was trained for
    final_norm: str = "norm"  # name
    positions: str | None = None  # name of a learned embedding of positions
    embedding_norm: str | None = None  # name of a norm on embeddings
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None  # bound of the logits, by tanh
