"""The roofline: the least cost of a forward pass, and how fast a device could run it at most.

Williams, Waterman and Patterson, 2009, doi:10.1145/1498765.1498785: a pass takes at least as long
as its bytes at the device's bandwidth, and as its FLOPs at the device's throughput.

Counted are weights, keys and values, and matrix products. Not counted are activations, norms, RoPE,
softmax and adapters, so these are lower bounds. ``docs/roofline.md`` has the formulas.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlxrun.kv_cache.options import Sparse

FLOPS_PER_MULTIPLY_ADD = 2


def expected_experts(count: int, used: int, tokens: float) -> float:
    """Expected number of distinct experts of ``count`` that tokens choose, ``used`` each.

    A token leaves an expert out with probability ``1 - used / count``, if choices are uniform and
    independent. Real routers are less even, and so read somewhat fewer.
    """
    return float(count * (1 - (1 - used / count) ** tokens))


def clipped_sum(start: int, step: int, count: int, most: int | None) -> int:
    """The sum of ``min(start + step * i, most)`` for i from 1 to ``count``."""
    growing = count if most is None else min(count, max(0, (most - start) // step))
    return growing * start + step * growing * (growing + 1) // 2 + (count - growing) * (most or 0)


def attended_keys(before: int, tokens: int, window: int | None = None) -> int:
    """Keys that ``tokens`` tokens after ``before`` others attend to, summed over the tokens."""
    return clipped_sum(before, 1, tokens, window)


@dataclass(frozen=True)
class ExpertCost:
    """Routed experts of layers that have equally many."""

    count: int  # in a layer
    used: int  # by one token
    nbytes: float  # of all of them

    def read(self, tokens: float) -> float:
        """Expected bytes of the experts that a pass over ``tokens`` reads."""
        return self.nbytes / self.count * expected_experts(self.count, self.used, tokens)


@dataclass(frozen=True)
class WeightCost:
    """Bytes of a model's weights, by how much of them a pass reads."""

    always: float  # read once by every pass: attention, feed-forward, routers, norms
    head: float  # output matrix, read once by a pass with logits; also that of tied embeddings
    row: float  # of the embedding, read for every token
    table: float  # all rows; 0 for tied embeddings, which are in ``head``
    experts: tuple[ExpertCost, ...] = ()

    @property
    def total(self) -> float:
        """Bytes of all weights, read or not."""
        return self.always + self.head + self.table + sum(each.nbytes for each in self.experts)

    def read(self, tokens: float) -> float:
        """Expected bytes that a pass over ``tokens`` tokens reads."""
        experts = sum(each.read(tokens) for each in self.experts)
        return self.always + self.head + self.row * tokens + experts


@dataclass(frozen=True)
class AttentionCost:
    """A layer's attention and cache."""

    token: int  # bytes of keys and values of one token, as the cache stores them
    fixed: int = 0  # bytes read for any number of tokens
    state: bool = False  # ``fixed`` is a recurrent state, which is written as well
    window: int | None = None  # most tokens in the cache
    pair: int = 0  # multiply-adds for one query and one key: a score, and the value's share
    sparse: Sparse | None = None  # keys that a decoded token attends to; None: all
    bound: int = 0  # bytes of the bounds of one block of keys, read to choose among blocks

    def decode_keys(self, before: int, tokens: int) -> int:
        """Keys that successive decoded tokens attend to, summed over them."""
        if self.sparse is None:
            return attended_keys(before, tokens, self.window)
        return sum(self.sparse.tokens(before + i) for i in range(1, tokens + 1))

    def decode_bytes(self, before: int, tokens: int) -> int:
        read = self.token * self.decode_keys(before, tokens) + self.fixed * tokens
        if self.sparse is not None and self.bound:
            read += self.bound * sum(self.sparse.bounds(before + i) for i in range(1, tokens + 1))
        return read

    def prefill_bytes(self, before: int, tokens: int, chunk: int) -> int:
        """Bytes that the passes of a prefill read: a key once, for all queries of a chunk."""
        passes, rest = divmod(tokens, chunk)
        # The queries of a full window see the window of the first one, and each other.
        most, least = (
            None if self.window is None else self.window + queries - 1 for queries in (chunk, rest)
        )
        keys = clipped_sum(before, chunk, passes, most)
        if rest:
            keys += clipped_sum(before + tokens - rest, rest, 1, least)
        return self.token * keys + self.fixed * (passes + bool(rest))

    def written(self, tokens: int, passes: int) -> int:
        """Bytes that some passes write."""
        return self.fixed * passes if self.state else self.token * tokens


@dataclass(frozen=True)
class ModelCost:
    """The terms of a model that decide on the cost of a pass."""

    weights: WeightCost
    layers: tuple[AttentionCost, ...]
    active: int | None  # weights that multiply one token in all layers; None where unknown
    head: int  # weights of the output matrix
    unknown: tuple[str, ...] = ()  # terms that could not be counted, for people
    batched: bool = True  # sequences that decode together share a pass


@dataclass(frozen=True)
class Cost:
    """Cost of some passes, summed."""

    passes: int
    tokens: int  # prefilled or decoded
    weights_read: float  # bytes
    cache_read: float
    cache_written: float
    operations: float | None  # FLOPs; None where unknown

    @property
    def nbytes(self) -> float:
        """Bytes between memory and processor."""
        return self.weights_read + self.cache_read + self.cache_written

    @property
    def intensity(self) -> float | None:
        return None if self.operations is None else self.operations / self.nbytes


def decode_cost(model: ModelCost, context: int, tokens: int = 1, rows: int = 1) -> Cost:
    """Decode ``tokens`` tokens in each of ``rows`` sequences that have ``context`` tokens each.

    The i-th pass feeds the token before back, so that it attends to ``context + i`` keys.
    """
    products = tokens * ((model.active or 0) + model.head)
    products += sum(layer.pair * layer.decode_keys(context, tokens) for layer in model.layers)
    passes, together = (tokens, rows) if model.batched else (tokens * rows, 1)
    return Cost(
        passes=passes,
        tokens=rows * tokens,
        weights_read=passes * model.weights.read(together),
        cache_read=rows * sum(layer.decode_bytes(context, tokens) for layer in model.layers),
        cache_written=rows * sum(layer.written(tokens, tokens) for layer in model.layers),
        operations=None if model.active is None else FLOPS_PER_MULTIPLY_ADD * rows * products,
    )


def prefill_cost(model: ModelCost, prompt: int, context: int = 0, *, chunk: int) -> Cost:
    """Prefill ``prompt`` tokens behind ``context`` others, a pass for each chunk."""
    full, rest = divmod(prompt, chunk)
    passes = full + bool(rest)
    weights = full * model.weights.read(chunk) + (model.weights.read(rest) if rest else 0)
    products = prompt * (model.active or 0) + model.head
    products += sum(
        layer.pair * attended_keys(context, prompt, layer.window) for layer in model.layers
    )
    return Cost(
        passes=passes,
        tokens=prompt,
        weights_read=weights - (passes - 1) * model.weights.head,  # only the last has logits
        cache_read=sum(layer.prefill_bytes(context, prompt, chunk) for layer in model.layers),
        cache_written=sum(layer.written(prompt, passes) for layer in model.layers),
        operations=None if model.active is None else FLOPS_PER_MULTIPLY_ADD * products,
    )


@dataclass(frozen=True)
class Roof:
    """Limits of a device."""

    bandwidth: float  # bytes/s between memory and processor
    throughput: float | None  # FLOPs/s in matrix products; None where there is no figure


@dataclass(frozen=True)
class Limit:
    """A bound of speed, never a measurement."""

    rate: float  # tokens/s over all sequences
    seconds: float  # the least time
    binds: str  # ``bandwidth`` or ``compute``
    whole: bool  # both were compared; else only bandwidth was known


def limit(cost: Cost, roof: Roof) -> Limit:
    """The limit of some passes on a device; that of bandwidth where FLOPs are not known."""
    moving, computing = cost.nbytes / roof.bandwidth, None
    if cost.operations is not None and roof.throughput is not None:
        computing = cost.operations / roof.throughput
    seconds = max(moving, computing or 0.0)
    binds = "bandwidth" if moving == seconds else "compute"
    return Limit(cost.tokens / seconds, seconds, binds, computing is not None)
