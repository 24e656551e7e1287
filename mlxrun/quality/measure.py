"""Perplexity of one model, or the divergence of two, over a text: window by window.

Joins models, their caches and their tokenizers to the pure functions of this package. Only a few
rows of logits are there at once; of each token a few numbers are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar, Unpack

import mlx.core as mx
import numpy as np

from mlxrun.computing import COMPUTING
from mlxrun.config import (
    DEFAULT_CACHE,
    CacheConfig,
    CacheTypeOptions,
    check_callback,
    known,
    names_of,
)
from mlxrun.engine.model_runner import not_finite
from mlxrun.errors import ParameterError
from mlxrun.memory.plan import MemoryPlan, plan_loaded
from mlxrun.quality.divergence import Comparison, Differences, Kept, comparison, differences
from mlxrun.quality.estimates import Estimate, Floats, mean
from mlxrun.quality.memory import check_memory
from mlxrun.quality.perplexity import Perplexity, perplexity_of, predicted
from mlxrun.quality.reading import logits_of
from mlxrun.quality.vocabularies import check_cut, check_same
from mlxrun.quality.windows import WindowOptions, Windows, windows

if TYPE_CHECKING:
    from mlxrun.llm import LLM

Progress = Callable[[int, int], None]
Part = tuple[mx.array, mx.array]
K = TypeVar("K")


def _tokens(llm: LLM, text: str, parse_special: bool) -> list[int]:
    return llm.tokenizer.encode(text, add_special=False, parse_special=parse_special)


class _Form:
    """A model and how it stores keys and values."""

    def __init__(self, llm: LLM, cache: CacheConfig) -> None:
        self.llm, self.model, self._config = llm, llm.model, cache
        self.model.make_cache(cache)  # raises now if the model cannot have such a cache

    def read(self, ids: list[int], scored: int) -> Iterator[Part]:
        """Logits before each of the last ``scored`` tokens of a window, and these tokens."""
        return logits_of(self.llm, self._config, ids, len(ids) - 1 - scored)

    def plan(self) -> MemoryPlan:
        """What it takes in memory."""
        return plan_loaded(self.model, self.llm.config, cache=self._config)

    def checked(self, array: mx.array) -> Floats:
        """Numbers on the host.

        Raises:
            NumericError: they are not finite.
            GGUFError: the model's file has been cut short.
        """
        numbers = np.array(array, dtype=np.float64)
        self.model.check()
        if not np.isfinite(numbers).all():
            raise not_finite(self.model)
        return numbers


class _Run(Generic[K]):
    """Windows that are read one by one, and what is kept of each; iterating reads on."""

    def __init__(self, plan: Windows) -> None:
        self.plan = plan
        self._kept: list[K] = []

    def _score(self, ids: list[int]) -> K:
        raise NotImplementedError

    def __iter__(self) -> Iterator[int]:
        """Yields how many windows have been read."""
        for ids in self.plan:
            self._kept.append(self._score(ids))
            yield len(self._kept)

    def _facts(self) -> dict[str, int]:
        plan = self.plan
        return {"windows": len(self._kept), "context": plan.context, "scored": plan.scored}

    def finish(self, progress: Progress | None) -> None:
        """Read all windows."""
        check_callback("progress", progress, "windows read and windows in all")
        for done in self:
            if progress:
                progress(done, self.plan.count)


class Scoring(_Run[Floats]):
    """Reads a text with one model; :func:`perplexity` has its arguments."""

    def __init__(
        self,
        llm: LLM,
        text: str,
        *,
        cache: CacheConfig = DEFAULT_CACHE,
        parse_special: bool = False,
        **wanted: Unpack[WindowOptions],
    ) -> None:
        self._form = _Form(llm, cache)
        tokens = _tokens(llm, text, parse_special)
        super().__init__(windows(tokens, llm.tokenizer.prefix, llm.context_length, **wanted))
        check_memory([self._form.plan()], self.plan.context, llm.model.vocab_size)

    def _score(self, ids: list[int]) -> Floats:
        parts = []
        for logits, targets in self._form.read(ids, self.plan.scored):
            with COMPUTING:
                parts.append(predicted(logits).surprises(targets))
                mx.eval(parts[-1])
        with COMPUTING:
            return self._form.checked(mx.concatenate(parts))

    def estimate(self) -> Estimate:
        """The perplexity so far."""
        return perplexity_of(np.concatenate(self._kept))[0]

    def result(self) -> Perplexity:
        """What follows from the windows that were read, at least one."""
        surprised = np.concatenate(self._kept)
        value, surprise = perplexity_of(surprised)
        return Perplexity(value, surprise, surprised.size, **self._facts())


class Comparing(_Run[Kept]):
    """Reads a text with two models; :func:`compare` has its arguments."""

    def __init__(
        self,
        a: LLM,
        b: LLM,
        text: str,
        *,
        cache_a: CacheConfig = DEFAULT_CACHE,
        cache_b: CacheConfig = DEFAULT_CACHE,
        parse_special: bool = False,
        **wanted: Unpack[WindowOptions],
    ) -> None:
        self._a, self._b = _Form(a, cache_a), _Form(b, cache_b)
        check_same(a, b)
        tokens = _tokens(a, text, parse_special)
        if b.tokenizer is not a.tokenizer:
            check_cut(tokens, _tokens(b, text, parse_special))
        longest = min(a.context_length, b.context_length)
        super().__init__(windows(tokens, a.tokenizer.prefix, longest, **wanted))
        plans = [self._a.plan(), self._b.plan()]
        if b.model is a.model:
            plans[1] = replace(plans[1], weights=0)
        elif b.source == a.source and a.model.mapped:  # what is mapped serves both
            plans[1] = replace(plans[1], weights=plans[1].weights - b.model.mapped)
        check_memory(plans, self.plan.context, a.model.vocab_size)

    def _score(self, ids: list[int]) -> Kept:
        parts: list[Differences] = []
        pairs = (form.read(ids, self.plan.scored) for form in (self._a, self._b))
        for (a, targets), (b, _) in zip(*pairs, strict=True):
            with COMPUTING:
                parts.append(differences(a, b, targets))
                mx.eval(parts[-1])
        with COMPUTING:
            whole = Differences(*(mx.concatenate(list(each)) for each in zip(*parts, strict=True)))
            return Kept(
                self._a.checked(whole.surprise_a),
                self._b.checked(whole.surprise_b),
                self._b.checked(whole.divergence),
                np.array(whole.agrees),
            )

    def estimate(self) -> Estimate:
        """The mean divergence so far, nats."""
        return mean(np.concatenate([kept.divergence for kept in self._kept]))

    def result(self) -> Comparison:
        """What follows from the windows that were read, at least one."""
        kept = Kept(*map(np.concatenate, zip(*self._kept, strict=True)))
        return comparison(kept, **self._facts())


class _ScoringOptions(WindowOptions, total=False):
    parse_special: bool


class PerplexityOptions(_ScoringOptions, CacheTypeOptions, total=False):
    """The options of :func:`perplexity`."""


class CompareOptions(_ScoringOptions, total=False):
    """The options of :func:`compare`; ``a_`` and ``b_`` are before those of one model alone."""

    a_cache_type_k: str | None
    a_cache_type_v: str | None
    b_cache_type_k: str | None
    b_cache_type_v: str | None


def _split(options: dict[str, Any], prefix: str = "") -> CacheConfig:
    """Take the cache types that begin with ``prefix`` out of ``options``."""
    names = [name for name in names_of(CacheTypeOptions) if prefix + name in options]
    return CacheConfig(**{name: options.pop(prefix + name) for name in names})


def perplexity(
    llm: LLM, text: str, *, progress: Progress | None = None, **options: Unpack[PerplexityOptions]
) -> Perplexity:
    """How well a model predicts a text, measured as by llama.cpp's llama-perplexity.

    Args:
        text: at least a window long.
        progress: called with (windows done, windows in all).
        context: tokens of a window; by default 512, or the model's context if that is less.
        stride: windows begin so many tokens apart, and so many at the end of each are scored. By
            default windows lie side by side, and the second half of each is scored, but for its
            first token: ``context - 1 - context // 2`` tokens.
        chunks: the most windows.
        bos: begin each window with the tokenizer's prefix, such as BOS, in place of its own first
            token; true by default.
        parse_special: let ``<|markers|>`` in the text be control tokens, as in recorded chats.
        cache_type_k, cache_type_v: see :class:`mlxrun.config.CacheConfig`. All tokens of
            a window attend to each other as they are stored.

    Raises:
        ParameterError: a value outside its range, or a text shorter than a window.
        ContextLengthError: a window longer than the model's context.
        CacheError: the model stores keys and values in its own way.
        NumericError: the model's output is not finite.
    """
    known(options, names_of(PerplexityOptions))
    given: dict[str, Any] = {**options}
    scoring = Scoring(llm, text, cache=_split(given), **given)
    scoring.finish(progress)
    return scoring.result()


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
        text, progress, context, stride, chunks, bos, parse_special: as in :func:`perplexity`.
        a_cache_type_k, a_cache_type_v, b_cache_type_k, b_cache_type_v: how each stores keys and
            values.

    Raises:
        TokenizerError: the vocabularies differ; the message says where.
        ParameterError, ContextLengthError, CacheError, NumericError: as :func:`perplexity`.
    """
    for name, model in (("a", a), ("b", b)):
        if not hasattr(model, "tokenizer"):
            raise ParameterError(name, model, "a model, as mlxrun.load returns it")
    known(options, names_of(CompareOptions))
    given: dict[str, Any] = {**options}
    cache_a, cache_b = _split(given, "a_"), _split(given, "b_")
    comparing = Comparing(a, b, text, cache_a=cache_a, cache_b=cache_b, **given)
    comparing.finish(progress)
    return comparing.result()
