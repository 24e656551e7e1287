"""Perplexity of a text; windows through the engine and estimates, for all evaluations.

Only a few rows of logits exist at once; of each token a few numbers are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, Unpack

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlxrun.config import (
    DEFAULT_CACHE,
    CacheConfig,
    CacheTypeOptions,
    check_callback,
    known,
    names_of,
)
from mlxrun.display import table_of
from mlxrun.engine.engine import Engine
from mlxrun.engine.model_runner import not_finite
from mlxrun.engine.prefix_reuse import PREFILL_CHUNK
from mlxrun.errors import MemoryLimitError
from mlxrun.eval.windows import WindowOptions, windows
from mlxrun.kernels.cpu_ops import exp, total
from mlxrun.lock import device_lock
from mlxrun.memory.plan import MemoryPlan, plan_loaded
from mlxrun.model import Model, WeightStorage
from mlxrun.outputs import Request
from mlxrun.tokenizer.tokenizer import Tokenizer

Floats = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]

# Bytes of logits at once, and rows at least, for products to be worth their while.
LOGITS_BYTES, FEWEST_ROWS = 16 << 20, 16
# Arrays as large as those logits that exist at once while tokens are scored, and while two models
# are compared. Measured on the CPU: 3 and 13.3.
_SCORED, _COMPARED = 4, 14


class ScorableLLM(Protocol):
    """The part of :class:`mlxrun.LLM` that is evaluated; that module imports this one."""

    model: Model[Any]
    tokenizer: Tokenizer
    config: dict[str, Any]
    source: str
    storage: WeightStorage

    @property
    def context_length(self) -> int: ...

    @property
    def direct_engine(self) -> Engine: ...


# --- estimates ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error, both in the same unit.

    Attributes:
        error: one standard error; NaN for a single observation. Tokens of a text are taken as
            independent, as llama.cpp takes them; they are not quite, so it is a little small.
    """

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.6g} ± {self.error:.2g}"


def mean(values: Floats) -> Estimate:
    """The mean of observations (N,), with ``sqrt(variance / (N - 1))`` as its error.

    Of zeros and ones that is the error of a binomial share.
    """
    error = math.sqrt(values.var() / (values.size - 1)) if values.size > 1 else math.nan
    return Estimate(float(values.mean()), error)


def root_mean_square(values: Floats) -> Estimate:
    """``sqrt(mean(x^2))``; its error follows from that of the mean of squares, to first order."""
    squares = mean(values**2)
    root = math.sqrt(squares.value)
    return Estimate(root, 0.5 * squares.error / root if root else squares.error)


def exponential(of: Estimate) -> Estimate:
    """``exp(x)`` of an estimate, its error to first order."""
    try:
        value = math.exp(of.value)
    except OverflowError:
        value = math.inf
    return Estimate(value, value * of.error if of.error else 0.0)


# --- logits ---------------------------------------------------------------------------------------


class Distribution(NamedTuple):
    """Predictions of T tokens, float32 (T, V)."""

    log_probs: mx.array
    probs: mx.array  # may be rounded to 0 where they are smaller than float32 goes

    def nll(self, targets: mx.array) -> mx.array:
        """Negative log-likelihoods of the tokens that followed, (T,), in nats, (T,)."""
        return -mx.take_along_axis(self.log_probs, targets[:, None], axis=-1)[:, 0]


def softmax(logits: mx.array) -> Distribution:
    """The softmax of logits, float32 (T, V), and its logarithm."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    powers = exp(shifted)
    whole = total(powers)
    return Distribution(shifted - mx.log(whole), powers / whole)


def rows_at_once(vocab_size: int) -> int:
    return max(FEWEST_ROWS, min(PREFILL_CHUNK, LOGITS_BYTES // (4 * max(1, vocab_size))))


def logits_of(
    llm: ScorableLLM, cache: CacheConfig, ids: list[int], first: int
) -> Iterator[tuple[mx.array, mx.array]]:
    """Logits after each token from position ``first`` on, but for the last.

    Args:
        ids: of a window, at least two.

    Yields:
        Logits, float32 (T, V), evaluated, and the tokens that followed, (T,); two models of the
        same vocabulary give parts of the same lengths.
    """
    engine, rows = llm.direct_engine, rows_at_once(llm.model.vocab_size)
    sequence = engine.prepare(Request(ids[:-1]), score_from=first, cache_config=cache)
    if not llm.model.joint:
        sequence.score_rows = rows
    for start, states in engine.scores(sequence):
        end = start + states.shape[1]
        for at in range(max(start, first), end, rows):
            stop = min(at + rows, end)
            with device_lock:
                logits = llm.model.head(states[:, at - start : stop - start])[0]
                logits = logits.astype(mx.float32)
                mx.eval(logits)
            yield logits, mx.array(ids[at + 1 : stop + 1])


def finite(model: Model[Any], values: mx.array) -> Floats:
    """Values on the host.

    Raises:
        NumericError: they are not finite.
        GGUFError: the model's file has been cut short.
    """
    numbers = np.array(values, dtype=np.float64)
    model.check()
    if not np.isfinite(numbers).all():
        raise not_finite(model)
    return numbers


def check_memory(plans: Sequence[MemoryPlan], context: int, vocab_size: int = 0) -> None:
    """Refuse an evaluation that memory has no room for.

    Args:
        plans: of each model; with weights of 0 where it shares another's.
        context: tokens of a window.
        vocab_size: logits of a token; 0 where it is not known yet.
    """
    terms = [plan.terms(context) for plan in plans]
    copies = _SCORED if len(plans) == 1 else _COMPARED
    logits = copies * 4 * vocab_size * rows_at_once(vocab_size)
    needed = sum(each.peak for each in terms) + max(each.reserve for each in terms) + logits
    limit = terms[0].limit
    if limit and needed > limit:
        task = "scoring the text" if len(plans) == 1 else "comparing the two, both in memory,"
        hint = "Use a smaller context (context=N, --context N), or smaller forms of the models"
        raise MemoryLimitError(needed, limit, task, hint)


# --- scoring --------------------------------------------------------------------------------------


class WindowScorer:
    """Scores a text with one model or two, window by window; iterating scores the next one.

    Args:
        sides: models and how each caches.
        tokens: of the text.

    Attributes:
        windows: of the text.
        scores: of the windows so far: numbers of each scored token, float64 (F, T).
    """

    def __init__(
        self,
        sides: Sequence[tuple[ScorableLLM, CacheConfig]],
        tokens: Sequence[int],
        **options: Unpack[WindowOptions],
    ) -> None:
        self._sides = sides
        self.scores: list[Floats] = []
        first, _ = sides[0]
        longest = min(llm.context_length for llm, _ in sides)
        self.windows = windows(tokens, first.tokenizer.prefix, longest, **options)
        plans = [
            plan_loaded(llm.model, llm.config, llm.storage, cache=cache) for llm, cache in sides
        ]
        for at, (llm, _) in enumerate(sides[1:], 1):
            if llm.model is first.model:
                plans[at] = replace(plans[at], weights=0)
            elif llm.source == first.source and first.model.mapped:  # both map the same file
                plans[at] = replace(plans[at], weights=plans[at].weights - llm.model.mapped)
        check_memory(plans, self.windows.context, first.model.vocab_size)

    def numbers(self, logits: list[mx.array], targets: mx.array) -> mx.array:
        """What is kept of each scored token, (F, T); first its likelihood by each model.

        Args:
            logits: of each model, float32 (T, V).
            targets: the token that followed each, (T,).
        """
        raise NotImplementedError

    def score(self, ids: list[int]) -> Floats:
        """The numbers of the scored tokens of a window, (F, T)."""
        parts = []
        first = len(ids) - 1 - self.windows.scored
        each = (logits_of(llm, cache, ids, first) for llm, cache in self._sides)
        for pairs in zip(*each, strict=True):
            with device_lock:
                parts.append(self.numbers([logits for logits, _ in pairs], pairs[0][1]))
                mx.eval(parts[-1])
        with device_lock:
            scores = mx.concatenate(parts, axis=1)
            for (llm, _), likelihoods in zip(self._sides, scores, strict=False):
                finite(llm.model, likelihoods)
            return finite(self._sides[-1][0].model, scores)

    def __iter__(self) -> Iterator[int]:
        """Yields the number of windows scored."""
        for ids in self.windows:
            self.scores.append(self.score(ids))
            yield len(self.scores)

    def run(self, progress: Progress | None) -> None:
        check_callback("progress", progress, "windows read and windows in all")
        for done in self:
            if progress:
                progress(done, self.windows.count)

    def all_scores(self) -> Floats:
        return np.concatenate(self.scores, axis=1)

    def counts(self) -> dict[str, int]:
        """Numbers of tokens and windows scored, and the sizes of windows."""
        windows, tokens = self.windows, sum(each.shape[1] for each in self.scores)
        return {
            "tokens": tokens,
            "windows": len(self.scores),
            "context": windows.context,
            "scored": windows.scored,
        }


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
        perplexity: ``exp(surprise)``: the number of equally likely tokens that would be as hard to
            choose among. 1 is certainty.
        surprise: the mean negative log-likelihood of a token, in nats.
        tokens, windows: scored.
        context: tokens of a window.
        scored: tokens scored at the end of each window.
    """

    perplexity: Estimate
    surprise: Estimate
    tokens: int
    windows: int
    context: int
    scored: int

    def _repr_html_(self) -> str:
        return table_of(self)


class PerplexityScorer(WindowScorer):
    """Scores a text with one model; :func:`perplexity` has the arguments."""

    def __init__(
        self,
        llm: ScorableLLM,
        text: str,
        *,
        cache: CacheConfig = DEFAULT_CACHE,
        parse_special: bool = False,
        **options: Unpack[WindowOptions],
    ) -> None:
        llm.model.make_cache(cache)  # raises now if the model cannot have such a cache
        tokens = llm.tokenizer.encode(text, add_special=False, parse_special=parse_special)
        super().__init__([(llm, cache)], tokens, **options)

    def numbers(self, logits: list[mx.array], targets: mx.array) -> mx.array:
        return softmax(logits[0]).nll(targets)[None]

    def estimate(self) -> Estimate:
        return self.result().perplexity

    def result(self) -> Perplexity:
        """The perplexity of the windows scored so far, at least one."""
        nll = mean(self.all_scores())
        return Perplexity(exponential(nll), nll, **self.counts())


class ScoringOptions(WindowOptions, total=False):
    """The options of windows, and how a text is encoded."""

    parse_special: bool


class PerplexityOptions(ScoringOptions, CacheTypeOptions, total=False):
    """The options of :func:`perplexity`."""


def take_cache(options: dict[str, Any], prefix: str = "") -> CacheConfig:
    """Take the cache types, whose names begin with ``prefix``, out of ``options``."""
    names = [name for name in names_of(CacheTypeOptions) if prefix + name in options]
    return CacheConfig(**{name: options.pop(prefix + name) for name in names})


def perplexity(
    llm: ScorableLLM,
    text: str,
    *,
    progress: Progress | None = None,
    **options: Unpack[PerplexityOptions],
) -> Perplexity:
    """How well a model predicts a text, measured as by llama.cpp's llama-perplexity.

    Args:
        text: at least a window long.
        progress: called with (windows done, windows in all).
        parse_special: let ``<|markers|>`` in the text be control tokens, as in recorded chats.
        options: see :class:`~mlxrun.eval.windows.WindowConfig`; and the cache types of
            :class:`mlxrun.config.CacheConfig`: all tokens of a window attend to each other as they
            are stored.

    Raises:
        ParameterError: a value outside its range, or a text shorter than a window.
        ContextLengthError: a window longer than the model's context.
        CacheError: the model stores keys and values in its own way.
        MemoryLimitError: memory has no room for it.
        NumericError: the model's output is not finite.
    """
    known(options, names_of(PerplexityOptions))
    given: dict[str, Any] = {**options}
    scorer = PerplexityScorer(llm, text, cache=take_cache(given), **given)
    scorer.run(progress)
    return scorer.result()
