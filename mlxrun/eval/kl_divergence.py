"""Kullback-Leibler divergence of one model's predictions from another's, over a text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Unpack

import mlx.core as mx
import numpy as np

from mlxrun.config import DEFAULT_CACHE, CacheConfig, known, names_of
from mlxrun.display import table_of
from mlxrun.errors import ParameterError, TokenizerError
from mlxrun.eval.perplexity import (
    Distribution,
    Estimate,
    Floats,
    Progress,
    ScoringOptions,
    WindowScorer,
    exponential,
    mean,
    root_mean_square,
    softmax,
    take_cache,
)
from mlxrun.eval.windows import WindowOptions
from mlxrun.kernels.cpu_ops import total

if TYPE_CHECKING:
    from mlxrun.llm import LLM

PERCENTILES = (50, 90, 95, 99, 99.9)
# Log ratios below this go through so many terms of a series.
_SMALL, _TERMS = 0.5, 7


@dataclass(frozen=True)
class Comparison:
    """How far a model B is from a model A on the same tokens of a text.

    Attributes:
        divergence: the mean Kullback-Leibler divergence D(A || B) of the two predictions of a
            token, in nats.
        percentiles: of the divergences of single tokens, in nats: "50" is the median.
        largest: of the divergences of single tokens, in nats.
        agreement: the share of tokens, 0 to 1, for which both think the same token likeliest.
        perplexity_a, perplexity_b: of each.
        log_ratio: ``ln(perplexity_b / perplexity_a)``; its error is that of the paired difference,
            much smaller than those of the perplexities.
        change: the mean of B's probability of the token that followed minus A's, from -1 to 1.
        rms_change: the root mean square of that difference.
        tokens, windows: scored.
        context: tokens of a window.
        scored: tokens scored at the end of each window.
    """

    divergence: Estimate
    percentiles: Mapping[str, float]
    largest: float
    agreement: Estimate
    perplexity_a: Estimate
    perplexity_b: Estimate
    log_ratio: Estimate
    change: Estimate
    rms_change: Estimate
    tokens: int
    windows: int
    context: int
    scored: int

    def _repr_html_(self) -> str:
        return table_of(self)


def kl_divergence(a: Distribution, b: Distribution) -> mx.array:
    """D(A || B) = sum(p_a * (ln p_a - ln p_b)) of each row, in nats.

    What is summed is ``p_a * (r - 1 - ln r)`` with ``r = p_b / p_a``, whose terms are never
    negative. It is the same, as probabilities sum to one; but an error in a row's normalization
    counts only squared, and where r is near to one a series has no cancellation. So float32
    resolves divergences far below its own precision of 1e-7.

    Args:
        a, b: predictions, (T, V).

    Returns:
        Float32, (T,), at least 0; exactly 0 for equal rows.
    """
    possible = a.probs > 0  # elsewhere r is undefined, and neither may logarithms be numbers
    x = mx.where(possible, a.log_probs - b.log_probs, 0)  # - ln r
    near = a.probs * x * x * _series(x)
    far = a.probs * (x - 1) + b.probs
    terms = mx.where(mx.abs(x) < _SMALL, near, far)
    return total(mx.where(possible, mx.maximum(terms, 0), b.probs))[:, 0]


def _series(x: mx.array) -> mx.array:
    """``(exp(-x) - 1 + x) / x^2`` by its Taylor series, to 1e-6 of it where ``|x| < _SMALL``."""
    series = mx.full((), 1 / math.factorial(_TERMS + 1))
    for n in range(_TERMS, 1, -1):
        series = 1 / math.factorial(n) - x * series
    return series


def token_scores(a: mx.array, b: mx.array, targets: mx.array) -> mx.array:
    """The numbers that are kept of each token.

    Args:
        a, b: logits of A and of B, float32 (T, V).
        targets: the token that followed each, (T,).

    Returns:
        Float32, (4, T): negative log-likelihoods of A and of B in nats, D(A || B), and 1 where both
        think the same token likeliest (of several, the first).
    """
    one, other = softmax(a), softmax(b)
    agrees = mx.argmax(a, axis=-1) == mx.argmax(b, axis=-1)
    divergence = kl_divergence(one, other)
    return mx.stack([one.nll(targets), other.nll(targets), divergence, agrees.astype(mx.float32)])


def comparison(scores: Floats, **counts: int) -> Comparison:
    """The figures of the tokens that were scored, at least one.

    Args:
        scores: of :func:`token_scores`, (4, N).
        counts: of :meth:`WindowScorer.counts`.
    """
    nll_a, nll_b, divergence, agrees = scores
    change = np.exp(-nll_b) - np.exp(-nll_a)
    levels = np.percentile(divergence, PERCENTILES)  # linear between neighbors
    return Comparison(
        divergence=mean(divergence),
        percentiles={f"{p:g}": float(x) for p, x in zip(PERCENTILES, levels, strict=True)},
        largest=float(divergence.max()),
        agreement=mean(agrees),
        perplexity_a=exponential(mean(nll_a)),
        perplexity_b=exponential(mean(nll_b)),
        log_ratio=mean(nll_b - nll_a),
        change=mean(change),
        rms_change=root_mean_square(change),
        **counts,
    )


class DivergenceScorer(WindowScorer):
    """Scores a text with two models; :func:`compare` has the arguments."""

    def __init__(
        self,
        a: LLM,
        b: LLM,
        text: str,
        *,
        cache_a: CacheConfig = DEFAULT_CACHE,
        cache_b: CacheConfig = DEFAULT_CACHE,
        parse_special: bool = False,
        **options: Unpack[WindowOptions],
    ) -> None:
        sides = [(a, cache_a), (b, cache_b)]
        for llm, cache in sides:
            llm.model.make_cache(cache)  # raises now if the model cannot have such a cache
        check_vocabularies(a, b)
        encoding = {"add_special": False, "parse_special": parse_special}
        tokens = a.tokenizer.encode(text, **encoding)
        if b.tokenizer is not a.tokenizer:
            check_tokens(tokens, b.tokenizer.encode(text, **encoding))
        super().__init__(sides, tokens, **options)

    def numbers(self, logits: list[mx.array], targets: mx.array) -> mx.array:
        one, other = logits
        return token_scores(one, other, targets)

    def estimate(self) -> Estimate:
        """The mean divergence so far, nats."""
        return self.result().divergence

    def result(self) -> Comparison:
        """The comparison over the windows scored so far, at least one."""
        return comparison(self.all_scores(), **self.counts())


class CompareOptions(ScoringOptions, total=False):
    """The options of :func:`compare`; ``a_`` and ``b_`` are before those of one model alone."""

    a_cache_type_k: str | None
    a_cache_type_v: str | None
    b_cache_type_k: str | None
    b_cache_type_v: str | None


def compare(
    a: LLM,
    b: LLM,
    text: str,
    *,
    progress: Progress | None = None,
    **options: Unpack[CompareOptions],
) -> Comparison:
    """How far B's predictions of a text are from A's.

    Args:
        a: the reference, such as ``load("model.gguf", policy="exact", dtype="float32")``.
        b: another model or form of the same vocabulary; it may be ``a`` itself.
        text, progress: as in :func:`~mlxrun.eval.perplexity.perplexity`, like the options of
            windows.
        a_cache_type_k, a_cache_type_v, b_cache_type_k, b_cache_type_v: how each stores keys and
            values.

    Raises:
        TokenizerError: the vocabularies differ; the message says where.
        ParameterError, ContextLengthError, CacheError, MemoryLimitError, NumericError: as
            :func:`~mlxrun.eval.perplexity.perplexity`.
    """
    from mlxrun.llm import LLM

    for name, model in (("a", a), ("b", b)):
        if not isinstance(model, LLM):
            raise ParameterError(name, model, "a model, as mlxrun.load returns it")
    known(options, names_of(CompareOptions))
    given: dict[str, Any] = {**options}
    cache_a, cache_b = take_cache(given, "a_"), take_cache(given, "b_")
    scorer = DivergenceScorer(a, b, text, cache_a=cache_a, cache_b=cache_b, **given)
    scorer.run(progress)
    return scorer.result()


def check_vocabularies(a: LLM, b: LLM) -> None:
    """Refuse models whose tokens differ, naming the first difference."""
    one, other = a.tokenizer, b.tokenizer
    if a.model.vocab_size != b.model.vocab_size:
        _differ(f"A has {a.model.vocab_size} tokens, B has {b.model.vocab_size}")
    if one is other:
        return
    for token in range(min(one.vocab_size, other.vocab_size)):  # one may name the padding
        in_a, in_b = one.piece(token), other.piece(token)
        # Files write tokens in their own ways, and a special token may have no bytes.
        if in_a != in_b and one.token_bytes(token) != other.token_bytes(token):
            _differ(f"token {token} is {in_a!r} in A and {in_b!r} in B")
    if one.prefix != other.prefix:
        _differ(f"A puts {_prefix(a)} before a text, B {_prefix(b)}")


def check_tokens(a: Sequence[int], b: Sequence[int]) -> None:
    """Refuse a text that two models tokenize differently; says where first."""
    pairs = enumerate(zip(a, b, strict=False))
    place = next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
    if place < max(len(a), len(b)):
        _differ(f"they cut the text differently from token {place} on")


def _prefix(llm: LLM) -> str:
    return " ".join(map(llm.tokenizer.piece, llm.tokenizer.prefix)) or "nothing"


def _differ(where: str) -> NoReturn:
    raise TokenizerError(
        f"the models have different vocabularies: {where}",
        hint="Compare two forms of one model, or models that share a tokenizer",
    )
