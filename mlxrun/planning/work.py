"""What passes through a model must do at least: bytes of memory, and arithmetic operations.

Pure functions of a model's :class:`Counts`, which :mod:`mlxrun.planning.counting` takes from
headers or from a loaded model. ``docs/roofline.md`` explains the formulas.

Units: bytes of memory traffic; FLOPs, of which a multiplication and the addition of its product
are two. Counted are weights, keys and values, and products of matrices. Not counted are activations
(they are small, and stay in caches and registers as far as a kernel can keep them there), norms,
rotations, softmax, what adapters multiply, and products with bounds of blocks. So these are lower
bounds. Knows no MLX.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlxrun.cache.sparsity import Sparse

# Multiplication and addition.
MULTIPLY_ADD = 2


def expected_experts(count: int, used: int, tokens: float) -> float:
    """How many distinct experts tokens go through, each through ``used`` of ``count``.

    An expert is left out by one token with probability ``1 - used / count`` and by all of them with
    that to the power of ``tokens``, if they choose independently and no expert more often than
    another. Real routers are less even, and so read somewhat fewer.
    """
    return float(count * (1 - (1 - used / count) ** tokens))


def keys_seen(before: int, tokens: int, window: int | None = None) -> int:
    """Keys that successive tokens attend to, themselves included, summed over the tokens.

    The i-th of ``tokens`` after ``before`` others sees ``before + i`` keys, or the last ``window``.
    """
    if window is None or before + tokens <= window:
        return tokens * before + tokens * (tokens + 1) // 2
    growing = max(0, window - before)  # tokens that still see everything
    return keys_seen(before, growing) + (tokens - growing) * window


@dataclass(frozen=True)
class Routed:
    """A layer's experts.

    Attributes:
        count, used: experts in all, and those that a token goes through.
        nbytes: of all of them.
    """

    count: int
    used: int
    nbytes: float

    def read(self, tokens: float) -> float:
        """Expected bytes of the experts that a pass over ``tokens`` reads."""
        return self.nbytes / self.count * expected_experts(self.count, self.used, tokens)


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's weights, by how much of them a pass reads.

    Attributes:
        always: read once by every pass: attention, feed-forwards, routers, norms.
        head: the output matrix, read once by a pass that expects a token; also of tied embeddings.
        row: looked up for every token: a row of the embedding.
        table: all rows; 0 for tied embeddings, which :attr:`head` counts.
        routed: experts by layer.
    """

    always: float
    head: float
    row: float
    table: float
    routed: tuple[Routed, ...] = ()

    @property
    def total(self) -> float:
        """Of all weights, which memory holds whether they are read or not."""
        return self.always + self.head + self.table + sum(r.nbytes for r in self.routed)

    def read(self, tokens: float) -> float:
        """Expected bytes that a pass over ``tokens`` tokens reads."""
        experts = sum(routed.read(tokens) for routed in self.routed)
        return self.always + self.head + self.row * tokens + experts


@dataclass(frozen=True)
class Attending:
    """A layer's attention and cache.

    Attributes:
        token: bytes of keys and values of one token, as the cache stores them.
        fixed: bytes that are read whatever the tokens.
        state: whether ``fixed`` is a state that every token changes, so that it is written as well.
        window: tokens remembered at most, or None.
        pair: multiplications for one query and one key: a score, and the value it weighs.
        sparse: which of the keys that are kept a drawn token sees; None for all. Prompts see all.
        bound: bytes of what is read of a block of keys to choose among blocks.
    """

    token: int
    fixed: int = 0
    state: bool = False
    window: int | None = None
    pair: int = 0
    sparse: Sparse | None = None
    bound: int = 0

    def drawn(self, before: int, tokens: int) -> int:
        """Keys that successive drawn tokens see, summed over them."""
        if self.sparse is None:
            return keys_seen(before, tokens, self.window)
        return sum(self.sparse.tokens(before + i) for i in range(1, tokens + 1))

    def bounds(self, before: int, tokens: int) -> int:
        """Bytes of bounds of blocks that they read to choose, summed over them."""
        if self.sparse is None or not self.bound:
            return 0
        return self.bound * sum(self.sparse.bounds(before + i) for i in range(1, tokens + 1))

    def reached(self, before: int, tokens: int, piece: int) -> int:
        """Keys that passes over pieces of a prompt read, each of those that any query of it sees.

        Args:
            before: tokens before the prompt.
            tokens: of the prompt.
            piece: tokens of each pass but the last, which has the rest.
        """
        passes, rest = divmod(tokens, piece)
        growing, most = passes, 0
        if self.window is not None:
            most = self.window + piece - 1
            growing = min(passes, max(0, (most - before) // piece))  # passes that see everything
        whole = growing * before + piece * growing * (growing + 1) // 2 + (passes - growing) * most
        if not rest:
            return whole
        return whole + min(before + tokens, (self.window or before + tokens) + rest - 1)


@dataclass(frozen=True)
class Counts:
    """What of a model decides on the work of a pass.

    Attributes:
        weights: its bytes.
        layers: attention and cache of each.
        multiplied: weights that one token is multiplied with in all layers, of the experts those
            that it goes through; None where that is not known.
        head: the same in the output matrix, for a token that is drawn.
        unknown: what could not be counted, in words.
        joint: sequences that decode together share a pass; else each has its own.
    """

    weights: Weights
    layers: tuple[Attending, ...]
    multiplied: int | None
    head: int
    unknown: tuple[str, ...] = ()
    joint: bool = True


@dataclass(frozen=True)
class Work:
    """What some passes must do, all of them together.

    Attributes:
        weights: bytes of weights read.
        cache_read, cache_written: bytes of keys and values.
        operations: FLOPs; None where they are not known.
        tokens: read as a prompt, or drawn.
        passes: how many.
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
        """FLOPs for each byte (Williams et al., 2009, doi:10.1145/1498765.1498785)."""
        return None if self.operations is None else self.operations / self.nbytes


def decode(counts: Counts, context: int, tokens: int = 1, rows: int = 1) -> Work:
    """Draw ``tokens`` tokens in each of ``rows`` sequences, a pass of all of them for each step.

    The i-th pass puts the token before through the model, so that it sees ``context + i`` keys.

    Args:
        context: tokens that each sequence holds before.
    """
    read = written = operations = 0
    for layer in counts.layers:
        seen = layer.drawn(context, tokens)
        read += rows * (layer.token * seen + layer.fixed * tokens + layer.bounds(context, tokens))
        written += rows * tokens * (layer.fixed if layer.state else layer.token)
        operations += rows * layer.pair * seen
    known = counts.multiplied is not None
    operations += rows * tokens * ((counts.multiplied or 0) + counts.head)
    passes, together = (tokens, rows) if counts.joint else (tokens * rows, 1)
    return Work(
        weights=passes * counts.weights.read(together),
        cache_read=read,
        cache_written=written,
        operations=MULTIPLY_ADD * operations if known else None,
        tokens=rows * tokens,
        passes=passes,
    )


def prefill(counts: Counts, prompt: int, context: int = 0, *, piece: int) -> Work:
    """Read a prompt in pieces, a pass for each, until the token after it is known.

    A pass reads the keys that are in reach once, however many queries meet them.

    Args:
        context: tokens that the sequence holds before.
        piece: the most tokens of a pass.
    """
    passes, rest = -(-prompt // piece), prompt % piece
    weights = prompt // piece * counts.weights.read(piece) + (
        counts.weights.read(rest) * bool(rest)
    )
    read = written = operations = 0
    for layer in counts.layers:
        read += layer.token * layer.reached(context, prompt, piece) + layer.fixed * passes
        written += layer.fixed * passes if layer.state else layer.token * prompt
        operations += layer.pair * keys_seen(context, prompt, layer.window)
    operations += prompt * (counts.multiplied or 0) + counts.head
    return Work(
        weights=weights - (passes - 1) * counts.weights.head,  # only the last expects a token
        cache_read=read,
        cache_written=written,
        operations=None if counts.multiplied is None else MULTIPLY_ADD * operations,
        tokens=prompt,
        passes=passes,
    )
