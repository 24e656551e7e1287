"""Feed-forward blocks: plain, gated, and mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from mlxrun.models.config import Experts, FeedForward
from mlxrun.models.functions import ACTIVATIONS, GATES, Function, compose
from mlxrun.weights.fused import Added
from mlxrun.weights.parameters import Parameters

Choice = tuple[mx.array, mx.array]


def feed_forward(
    config: FeedForward | Experts, hidden: int, params: Parameters, norm: Function | None = None
) -> Added:
    """``x (B, T, hidden) or of single tokens (B, hidden) -> the same shape``, plus a residual.

    Args:
        norm: of ``x``, before all else.
    """
    if isinstance(config, Experts):
        return _experts(config, hidden, params, norm)
    size = config.size
    down = params.linear(config.names[-1], hidden, size)
    if len(config.names) == 2 and not config.fused:
        project = params.linear(config.names[0], size, hidden, norm=norm)
        wide = compose(project, ACTIVATIONS[config.activation])
    else:
        wide = params.gated(config.names[:-1], size, hidden, GATES[config.activation], norm=norm)
    return lambda x, residual=None: down(wide(x), residual)


def _experts(config: Experts, hidden: int, params: Parameters, norm: Function | None) -> Added:
    """Shazeer et al., 2017, arXiv:1701.06538; each token's experts are gathered, not all run."""
    count, size = config.count, config.size
    switch = params.under(config.experts)
    names = ("gate_proj", "up_proj")
    wide = switch.gated_experts(names, count, size, hidden, GATES[config.activation])
    down = switch.experts("down_proj", count, hidden, size)
    choose, shared = _router(config, hidden, params), _shared(config, hidden, params)

    def mix(x: mx.array, residual: mx.array | None = None) -> mx.array:
        x = x if norm is None else norm(x)
        chosen, weights = choose(x)  # (B, T, K)
        y = down(wide(x[..., None, None, :], chosen), chosen)  # (B, T, K, 1, hidden)
        y = (y.squeeze(-2) * weights[..., None].astype(y.dtype)).sum(axis=-2)
        y = y if residual is None else residual + y
        return y if shared is None else shared(x, y)

    return mix


def _router(config: Experts, hidden: int, params: Parameters) -> Callable[[mx.array], Choice]:
    """``x (B, T, hidden) -> experts (B, T, K) and their weights (B, T, K) float32``."""
    route = params.linear(config.router, config.count, hidden)
    bias = params.vector(config.bias, config.count) if config.bias else None
    gating, used = config.gating, config.used

    def choose(x: mx.array) -> Choice:
        logits = route(x).astype(mx.float32)
        if gating == "softmax":
            weights = mx.softmax(logits, axis=-1)
        else:
            weights = mx.sigmoid(logits) if gating == "sigmoid" else logits
        ranking = weights if bias is None else weights + bias
        if config.groups > 1:
            ranking = _best_groups(ranking, config.groups, config.used_groups)
        chosen = mx.argpartition(-ranking, kth=used - 1, axis=-1)[..., :used]
        weights = mx.take_along_axis(weights, chosen, axis=-1)
        if gating == "softmax_topk":
            weights = mx.softmax(weights, axis=-1)
        if config.normalize and gating != "softmax_topk":
            weights = weights / weights.sum(axis=-1, keepdims=True)
        return chosen, weights * config.scale

    return choose


def _best_groups(ranking: mx.array, groups: int, used: int) -> mx.array:
    """Rankings (B, T, E) with -inf for the experts of all but the best groups.

    A group ranks as the sum of its two best experts (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).
    """
    grouped = mx.unflatten(ranking, -1, (groups, -1))  # (B, T, G, E/G)
    quality = mx.topk(grouped, min(2, grouped.shape[-1]), axis=-1).sum(axis=-1)  # (B, T, G)
    worst = mx.argpartition(quality, kth=groups - used - 1, axis=-1)[..., : groups - used]
    out = mx.put_along_axis(mx.zeros_like(quality), worst, mx.array(-mx.inf), axis=-1)
    return mx.flatten(grouped + out[..., None], -2, -1)


def _shared(config: Experts, hidden: int, params: Parameters) -> Added | None:
    """The shared expert."""
    if config.shared is None:
        return None
    run = feed_forward(config.shared, hidden, params.under(config.shared_name))
    if config.shared_gate is None:
        return run
    gate = params.linear(config.shared_gate, 1, hidden)

    def gated(x: mx.array, residual: mx.array | None = None) -> mx.array:
        y = mx.sigmoid(gate(x)) * run(x)
        return y if residual is None else residual + y

    return gated
