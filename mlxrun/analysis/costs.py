"""The roofline: the least cost of a forward pass, and how fast a device could run it at most.

Williams, Waterman and Patterson, 2009, doi:10.1145/1498765.1498785: a pass takes at least as long
as its bytes at the device's bandwidth, and as its FLOPs at the device's throughput.

Pure functions of a :class:`ModelCost`, which :mod:`mlxrun.analysis.model_cost` makes from headers
or from a loaded model. ``docs/roofline.md`` has the formulas.

Counted are weights, keys and values, and matrix products; a multiply-add is two FLOPs. Not counted
are activations (small, and mostly in caches and registers), norms, RoPE, softmax, adapters, and
products with bounds of blocks. So these are lower bounds.
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


def attended_keys(before: int, tokens: int, window: int | None = None) -> int:
    """Keys that ``tokens`` tokens after ``before`` others attend to, summed over the tokens.

    The i-th attends to ``before + i`` keys, or to the last ``window``.
    """
    if window is None or before + tokens <= window:
        return tokens * before + tokens * (tokens + 1) // 2
    growing = max(0, window - before)  # tokens whose window is not full yet
    return attended_keys(before, growing) + (tokens - growing) * window


@dataclass(frozen=True)
class ExpertCost:
    """A layer's experts.

    Attributes:
        count, used: experts in all, and those of one token.
        nbytes: of all of them.
    """

    count: int
    used: int
    nbytes: float

    def read(self, tokens: float) -> float:
        """Expected bytes of the experts that a pass over ``tokens`` reads."""
        return self.nbytes / self.count * expected_experts(self.count, self.used, tokens)


@dataclass(frozen=True)
class WeightCost:
    """Bytes of a model's weights, by how much of them a pass reads.

    Attributes:
        always: read once by every pass: attention, feed-forward, routers, norms.
        head: output matrix, read once by a pass with logits; also that of tied embeddings.
        row: of the embedding, read for every token.
        table: all rows; 0 for tied embeddings, which are in ``head``.
        experts: by layer.
    """

    always: float
    head: float
    row: float
    table: float
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
    """A layer's attention and cache.

    Attributes:
        token: bytes of keys and values of one token, as the cache stores them.
        fixed: bytes read for any number of tokens.
        state: whether ``fixed`` is a recurrent state, which is written as well.
        window: most tokens in the cache, or None.
        pair: multiply-adds for one query and one key: a score, and the value's share.
        sparse: which of the keys a decoded token attends to; None: all. Prefill is dense.
        bound: bytes of the bounds of one block of keys, read to choose among blocks.
    """

    token: int
    fixed: int = 0
    state: bool = False
    window: int | None = None
    pair: int = 0
    sparse: Sparse | None = None
    bound: int = 0

    def decode_keys(self, before: int, tokens: int) -> int:
        """Keys that successive decoded tokens attend to, summed over them."""
        if self.sparse is None:
            return attended_keys(before, tokens, self.window)
        return sum(self.sparse.tokens(before + i) for i in range(1, tokens + 1))

    def bound_bytes(self, before: int, tokens: int) -> int:
        """Bytes of bounds of blocks that they read, summed over them."""
        if self.sparse is None or not self.bound:
            return 0
        return self.bound * sum(self.sparse.bounds(before + i) for i in range(1, tokens + 1))

    def prefill_keys(self, before: int, tokens: int, chunk: int) -> int:
        """Keys that the passes of a prefill read: for each chunk, those of any of its queries."""
        passes, rest = divmod(tokens, chunk)
        growing, most = passes, 0
        if self.window is not None:
            most = self.window + chunk - 1
            growing = min(passes, max(0, (most - before) // chunk))  # before the window is full
        whole = growing * before + chunk * growing * (growing + 1) // 2 + (passes - growing) * most
        if not rest:
            return whole
        return whole + min(before + tokens, (self.window or before + tokens) + rest - 1)


@dataclass(frozen=True)
class ModelCost:
    """The terms of a model that decide on the cost of a pass.

    Attributes:
        weights: bytes.
        layers: attention and cache of each.
        active: weights that multiply one token in all layers, of experts those that it uses; None
            where unknown.
        head: weights of the output matrix.
        unknown: terms that could not be counted, for people.
        batched: whether sequences that decode together share a pass.
    """

    weights: WeightCost
    layers: tuple[AttentionCost, ...]
    active: int | None
    head: int
    unknown: tuple[str, ...] = ()
    batched: bool = True


@dataclass(frozen=True)
class Cost:
    """Cost of some passes, summed.

    Attributes:
        weights: bytes of weights read.
        cache_read, cache_written: bytes of keys and values.
        operations: FLOPs; None where unknown.
        tokens: prefilled or decoded.
        passes: their number.
    """

    weights: float
    cache_read: float
    cache_written: float
    operations: float | None
    tokens: int
    passes: int

    @property
    def nbytes(self) -> float:
        """Bytes between memory and processor."""
        return self.weights + self.cache_read + self.cache_written

    @property
    def intensity(self) -> float | None:
        """FLOPs for each byte."""
        return None if self.operations is None else self.operations / self.nbytes


def decode_cost(model: ModelCost, context: int, tokens: int = 1, rows: int = 1) -> Cost:
    """Decode ``tokens`` tokens in each of ``rows`` sequences that have ``context`` tokens each.

    The i-th pass feeds the token before back, so that it attends to ``context + i`` keys.
    """
    read = written = operations = 0
    for layer in model.layers:
        keys = layer.decode_keys(context, tokens)
        bounds = layer.bound_bytes(context, tokens)
        read += rows * (layer.token * keys + layer.fixed * tokens + bounds)
        written += rows * tokens * (layer.fixed if layer.state else layer.token)
        operations += rows * layer.pair * keys
    operations += rows * tokens * ((model.active or 0) + model.head)
    passes, together = (tokens, rows) if model.batched else (tokens * rows, 1)
    return Cost(
        weights=passes * model.weights.read(together),
        cache_read=read,
        cache_written=written,
        operations=None if model.active is None else FLOPS_PER_MULTIPLY_ADD * operations,
        tokens=rows * tokens,
        passes=passes,
    )


def prefill_cost(model: ModelCost, prompt: int, context: int = 0, *, chunk: int) -> Cost:
    """Prefill ``prompt`` tokens behind ``context`` others, a pass for each chunk.

    A pass reads a key once, for all of its queries.
    """
    passes, rest = -(-prompt // chunk), prompt % chunk
    weights = prompt // chunk * model.weights.read(chunk)
    if rest:
        weights += model.weights.read(rest)
    read = written = operations = 0
    for layer in model.layers:
        read += layer.token * layer.prefill_keys(context, prompt, chunk) + layer.fixed * passes
        written += layer.fixed * passes if layer.state else layer.token * prompt
        operations += layer.pair * attended_keys(context, prompt, layer.window)
    operations += prompt * (model.active or 0) + model.head
    return Cost(
        weights=weights - (passes - 1) * model.weights.head,  # only the last pass has logits
        cache_read=read,
        cache_written=written,
        operations=None if model.active is None else FLOPS_PER_MULTIPLY_ADD * operations,
        tokens=prompt,
        passes=passes,
    )


@dataclass(frozen=True)
class Roof:
    """Limits of a device.

    Attributes:
        bandwidth: bytes/s between memory and processor.
        throughput: FLOPs/s in matrix products; None where there is no figure.
    """

    bandwidth: float
    throughput: float | None


@dataclass(frozen=True)
class Limit:
    """A bound of speed, never a measurement.

    Attributes:
        rate: tokens/s over all sequences.
        seconds: the least time.
        binds: ``bandwidth`` or ``compute``.
        whole: whether both were compared; else only bandwidth was known.
    """

    rate: float
    seconds: float
    binds: str
    whole: bool


def limit(cost: Cost, roof: Roof) -> Limit:
    """The limit of some passes on a device; that of bandwidth where FLOPs are not known."""
    moving, computing = cost.nbytes / roof.bandwidth, None
    if cost.operations is not None and roof.throughput is not None:
        computing = cost.operations / roof.throughput
    seconds = max(moving, computing or 0.0)
    binds = "bandwidth" if moving == seconds else "compute"
    return Limit(cost.tokens / seconds, seconds, binds, computing is not None)
