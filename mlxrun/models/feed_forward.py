"""Feed-forward blocks."""

from __future__ import annotations

import mlx.core as mx

from mlxrun.models.config import FeedForward
from mlxrun.models.functions import ACTIVATIONS, Function
from mlxrun.models.parameters import Parameters


def feed_forward(config: FeedForward, hidden: int, params: Parameters) -> Function:
    """``x (B, T, hidden) -> (B, T, hidden)``."""
    size, activation = config.size, ACTIVATIONS[config.activation]
    down = params.linear(config.names[-1], hidden, size)
    if config.fused:
        both = params.linear(config.names[0], 2 * size, hidden)

        def fused(x: mx.array) -> mx.array:
            gate, up = mx.split(both(x), 2, axis=-1)
            return down(activation(gate) * up)

        return fused
    up = params.linear(config.names[-2], size, hidden)
    if len(config.names) == 2:
        return lambda x: down(activation(up(x)))
    gate = params.linear(config.names[0], size, hidden)
    return lambda x: down(activation(gate(x)) * up(x))
