"""The llama architecture for training, in MLX, with gradients that are fast on a CPU.

MLX's CPU backend on x86 computes `exp` one element at a time (10 ns each), and attention and SwiGLU
are full of it. The functions here use a polynomial instead, which compiles into vector code and is
five times faster. They agree with the exact ones to one part in ten thousand, so what is trained
here runs unchanged elsewhere.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path


@dataclass(frozen=True)
class Config:
    layers: int = 4
    hidden: int = 256
    heads: int = 8
    kv_heads: int = 4
    feed_forward: int = 768
    vocabulary: int = 2048
    context: int = 1024
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def to_dict(self) -> dict[str, int | float]:
        return asdict(self)


DEMO = Config()
DRAFT = Config(layers=1, heads=8, kv_heads=4, feed_forward=512)


@mx.compile
def _exp(x: mx.array) -> mx.array:
    """exp for -30 <= x <= 30: (Taylor of degree 4 at x/64) ** 64."""
    y = x * (1 / 64)
    p = 1 + y * (1 + y * (1 / 2 + y * (1 / 6 + y * (1 / 24))))
    for _ in range(6):
        p = p * p
    return p


def _exp_below(x: mx.array, top: mx.array) -> mx.array:
    """exp(x - top) for x <= top; what is 30 or more below counts as 30 below, which is nothing."""
    return _exp(mx.maximum(x - top, -30))


@mx.custom_function
def softmax(scores: mx.array) -> mx.array:
    """Over the last axis."""
    weights = _exp_below(scores, scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@softmax.vjp
def _softmax_vjp(_scores, cotangent, output):  # type: ignore[no-untyped-def]
    product = output * cotangent
    return product - output * product.sum(-1, keepdims=True)


@mx.compile
def _swiglu(gate: mx.array, up: mx.array, negative_exp: mx.array) -> mx.array:
    return gate / (1 + negative_exp) * up


@mx.compile
def _swiglu_vjp(
    gate: mx.array, up: mx.array, negative_exp: mx.array, cotangent: mx.array
) -> tuple[mx.array, mx.array]:
    sigmoid = 1 / (1 + negative_exp)
    silu = gate * sigmoid
    return cotangent * up * (sigmoid + silu * (1 - sigmoid)), cotangent * silu


def _negative_exp(gate: mx.array) -> mx.array:
    """exp(-gate); beyond 30 either way the sigmoid is 0 or 1 to all digits."""
    return _exp(mx.minimum(mx.maximum(-gate, -30), 30))


@mx.custom_function
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up."""
    return _swiglu(gate, up, _negative_exp(gate))


@swiglu.vjp
def _(primals, cotangent, _output):  # type: ignore[no-untyped-def]
    gate, up = primals
    return _swiglu_vjp(gate, up, _negative_exp(gate), cotangent)


@mx.custom_function
def logsumexp(logits: mx.array) -> mx.array:
    """Over the last axis."""
    top = logits.max(-1, keepdims=True)
    return mx.log(_exp_below(logits, top).sum(-1)) + top[..., 0]


@logsumexp.vjp
def _logsumexp_vjp(logits, cotangent, output):  # type: ignore[no-untyped-def]
    return _exp_below(logits, output[..., None]) * cotangent[..., None]


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self._config = config
        kv_width = config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden, config.hidden, bias=False)
        self.k_proj = nn.Linear(config.hidden, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden, kv_width, bias=False)
        self.o_proj = nn.Linear(config.hidden, config.hidden, bias=False)

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        c = self._config
        batch, length, _ = x.shape
        group = c.heads // c.kv_heads

        def split(y: mx.array, heads: int) -> mx.array:
            return y.reshape(batch, length, heads, c.head_dim).transpose(0, 2, 1, 3)  # (B, H, T, D)

        def rope(y: mx.array) -> mx.array:
            return mx.fast.rope(
                y, c.head_dim, traditional=False, base=c.rope_theta, scale=1.0, offset=0
            )

        q = rope(split(self.q_proj(x), c.heads)) * c.head_dim**-0.5
        k = rope(split(self.k_proj(x), c.kv_heads))
        v = split(self.v_proj(x), c.kv_heads)
        # The query heads of a group stand below each other: one product per key head.
        q = q.reshape(batch, c.kv_heads, group * length, c.head_dim)
        weights = softmax(q @ k.swapaxes(-1, -2) + mask)  # (B, KV, group * T, T)
        out = (weights @ v).reshape(batch, c.heads, length, c.head_dim)
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(batch, length, c.hidden))


class FeedForward(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.feed_forward, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.feed_forward, bias=False)
        self.down_proj = nn.Linear(config.feed_forward, config.hidden, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Layer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.mlp = FeedForward(config)

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Token ids (B, T) to hidden states (B, T, hidden); `logits` gives them a word each."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._config = config
        self.embed_tokens = nn.Embedding(config.vocabulary, config.hidden)
        self.layers = [Layer(config) for _ in range(config.layers)]
        self.norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)

    def __call__(self, tokens: mx.array) -> mx.array:
        length = tokens.shape[1]
        mask = mx.triu(mx.full((length, length), -1e9), k=1)
        mask = mx.concatenate([mask] * (self._config.heads // self._config.kv_heads))
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x)

    def logits(self, hidden: mx.array) -> mx.array:
        return self.embed_tokens.as_linear(hidden)


def initialize(model: Llama, seed: int) -> None:
    """Normal weights of deviation 0.02, smaller where a layer adds to the residual stream."""
    mx.random.seed(seed)
    depth = 2 * len(model.layers)

    def draw(path: str, weight: mx.array) -> mx.array:
        if weight.ndim < 2:
            return mx.ones_like(weight)
        residual = path.endswith(("o_proj.weight", "down_proj.weight"))
        return mx.random.normal(weight.shape) * (0.04 / (depth**0.5 if residual else 1.0))

    model.update(tree_map_with_path(draw, model.parameters()))
