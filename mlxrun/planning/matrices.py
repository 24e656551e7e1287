"""How many weights the matrices of a block have, from its config.

The memory plan unpacks them, the roofline multiplies with them. Knows no bytes.
"""

from __future__ import annotations

from mlxrun.models.config import Attention, Experts, FeedForward, LatentAttention, Layer


def of_block(block: Layer, hidden: int) -> int:
    """Weights that every token meets: all matrices of a block but its experts.

    Args:
        hidden: width of the stream.
    """
    return of_attention(block.attention, hidden) + of_feed_forward(block.feed_forward, hidden)


def of_attention(attention: Attention | LatentAttention, hidden: int) -> int:
    """Weights of the projections of attention."""
    heads = attention.heads
    if isinstance(attention, LatentAttention):
        turning, latent = attention.rope.dims, attention.latent
        rows, wide = heads * (attention.head_dim + turning), attention.query_latent
        queries = rows * hidden if wide is None else wide * (hidden + rows)
        compressed = (latent + turning) * hidden
        inward, outward = attention.head_dim * latent, latent * attention.value_dim
        return queries + compressed + heads * (inward + outward + attention.value_dim * hidden)
    return 2 * hidden * attention.head_dim * (heads + attention.kv_heads)


def of_feed_forward(fed: FeedForward | Experts, hidden: int) -> int:
    """Weights of a feed-forward; of experts the router's, and of what all tokens go through."""
    if isinstance(fed, Experts):
        shared = of_feed_forward(fed.shared, hidden) if fed.shared else 0
        gate = hidden if fed.shared_gate else 0
        return fed.count * hidden + shared + gate
    gated = fed.fused or len(fed.names) == 3
    return (3 if gated else 2) * hidden * fed.size


def of_experts(fed: FeedForward | Experts, hidden: int, *, used: bool) -> int:
    """Weights of all experts, or of those that one token goes through; 0 where there are none."""
    if not isinstance(fed, Experts):
        return 0
    return 3 * hidden * fed.size * (fed.used if used else fed.count)
