"""Prefill, decode, sample: the loop that turns a request into tokens.

Knows models, caches and samplers; knows nothing of text. The weights are immutable; what a
conversation remembers lives in a :class:`Session`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

import mlx.core as mx

from mlxrun.computing import COMPUTING
from mlxrun.display import table
from mlxrun.errors import CacheError, NumericError, ProcessError
from mlxrun.generation.sampling import Sampled, Sampler
from mlxrun.generation.stepping import Stepper, draw
from mlxrun.kv_cache import storage
from mlxrun.kv_cache.prefix_cache import PrefixCache, common_prefix_len
from mlxrun.model import Model
from mlxrun.outputs import TokenLogprob

# Tokens per forward pass of the prefill: enough for matrix products to be efficient, few enough to
# bound the memory of a pass and to let a caller show progress.
PREFILL_CHUNK = 512

Progress = Callable[[int, int], None]


@dataclass
class Session:
    """What one conversation has put through the model: its caches and the tokens they hold.

    A session belongs to one model and to one request at a time: a request that finds the session
    taken by a later one, or taken back, fails rather than go on from other tokens than its own.

    Args:
        make: empty caches, as the model wants them.
        windowed: whether old tokens are forgotten, so that the context never fills.
        owner: the model; another one's tokens would mean nothing to it.
        prefixes: beginnings that others have computed, to start from and to add to.
        step: tokens whose multiples are taken over from there; see ``cache.prefix``.
        identity: which model it is, for files; None for one that cannot be told from others.
        options: what it was made with, for files.

    Attributes:
        cache: what the model remembers, e.g. a cache per layer.
        tokens: ids that went through the caches, in order.
        reused: tokens of the last prompt that need not be computed.
        turn: how often it went back or began afresh: who drew from it before cannot go on.
    """

    make: Callable[[], list[Any]]
    windowed: bool = False
    owner: Model[Any] | None = field(default=None, repr=False)
    prefixes: PrefixCache | None = field(default=None, repr=False)
    step: int = 1
    identity: Callable[[], str] | None = field(default=None, repr=False)
    options: Mapping[str, Any] = field(default_factory=dict)
    cache: list[Any] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    reused: int = field(default=0, init=False)
    turn: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.cache = self.cache or self.make()

    def __repr__(self) -> str:
        tokens = len(self.tokens)
        windowed = ", which forgets old ones" if self.windowed else ""
        return f"Session({tokens} token{'s' * (tokens != 1)}{windowed})"

    def _repr_html_(self) -> str:
        options = {name: value for name, value in self.options.items() if value is not None}
        return table({"tokens": len(self.tokens), "bytes": self.nbytes, **options})

    def __reduce__(self) -> NoReturn:
        raise ProcessError(
            "a session cannot be pickled: it belongs to a model in this process",
            hint="Save it to a file for another process; fork() copies it in this one",
        )

    def reuse(self, prompt: Sequence[int]) -> int:
        """Go back to where the prompt leaves what is remembered; returns the tokens kept.

        At least one token is left to compute: its logits are needed.
        """
        wanted = tuple(prompt[:-1])
        self.rewind(common_prefix_len(tuple(self.tokens), wanted))
        if self.prefixes is not None:
            self._take_over(self.prefixes, wanted)
        self.reused = len(self.tokens)
        return self.reused

    def _take_over(self, prefixes: PrefixCache, wanted: tuple[int, ...]) -> None:
        """Start from what others have computed, where that is more."""
        cache, worth = self.make(), len(self.tokens) + prefixes.min_prefix_len
        lease = prefixes.restore(wanted, cache, self.step, least=worth)
        if lease is not None:
            lease.release()  # what was taken over are copies
            self.cache, self.tokens = cache, list(wanted[: lease.length])

    def keep(self) -> None:
        """Let others start from what this session has seen."""
        if self.prefixes is not None and len(self.tokens) >= self.prefixes.min_prefix_len:
            self.prefixes.insert(self.tokens, self.cache, self.step)

    def save(self, path: str | Path) -> None:
        """Write what the session remembers, to be read by ``LLM.load_session``.

        The file is bound to model, tokenizer and chat template. An existing file is replaced if it
        is a saved session, of whatever model; anything else is left alone.

        Raises:
            CacheError: there is nothing to write, or the file cannot be written or is something
                else.
        """
        if self.identity is None:
            raise CacheError("this session belongs to a model that came from no file")
        with COMPUTING:
            storage.write(Path(path), self.identity(), self.tokens, self.cache, self.options)

    def rewind(self, length: int) -> int:
        """Forget all but the first ``length`` tokens; forget all where a cache cannot go back."""
        with COMPUTING:
            self.turn += 1
            try:
                for cache in self.cache:
                    cache.truncate(0, cache.offset - length)
                del self.tokens[length:]
            except CacheError:
                self.reset()
            return len(self.tokens)

    def reset(self) -> None:
        """Start afresh."""
        with COMPUTING:
            self.turn += 1
            self.cache, self.tokens = self.make(), []

    def fork(self) -> Session:
        """A session with the same past that goes its own way from here."""
        with COMPUTING:
            forks = [cache.fork() for cache in self.cache]
            return replace(self, cache=forks, tokens=list(self.tokens))

    def check(self, turn: int) -> None:
        """See to it that nobody else has used the session since a turn.

        Raises:
            CacheError: somebody has.
        """
        if self.turn != turn:
            raise CacheError(
                "the session of this request is used by another, or was taken back",
                hint="Give each of two streams a session of its own, or a fork",
            )

    @property
    def nbytes(self) -> int:
        """Bytes that the caches have allocated."""
        return sum(cache.nbytes for cache in self.cache)


def prefill(
    model: Model[Any],
    session: Session,
    prompt: Sequence[int],
    progress: Progress | None = None,
) -> mx.array:
    """Put what a session does not hold of a prompt through the model.

    Returns:
        Logits after the last token, (1, V), unevaluated.

    Raises:
        CacheError: ``progress`` has used the session for something else.
    """
    start = session.reuse(prompt)
    turn = session.turn
    for cache in session.cache:
        cache.prompt = len(prompt)
    if progress:
        progress(start, len(prompt))
        session.check(turn)
    while len(prompt) - start > PREFILL_CHUNK:
        part = prompt[start : start + PREFILL_CHUNK]
        model(mx.array([part]), session.cache, last_only=True)
        mx.eval([array for cache in session.cache for array in cache.state])
        session.tokens.extend(part)
        session.keep()
        start += len(part)
        if progress:
            progress(start, len(prompt))
            session.check(turn)
    logits = model(mx.array([prompt[start:]]), session.cache, last_only=True)
    session.tokens.extend(prompt[start:])
    session.keep()
    return logits[:, -1]


def score(model: Model[Any], tokens: Sequence[int]) -> mx.array:
    """What a model expects after each token, read in chunks as ``prefill`` reads a prompt.

    Besides the logits it takes no more memory than a chunk's pass.

    Returns:
        Logits, float32, (T, V), evaluated.

    Raises:
        GGUFError: the model's file has been cut short.
    """
    cache = model.make_cache()
    rows = []
    for start in range(0, len(tokens), PREFILL_CHUNK):
        part = mx.array([tokens[start : start + PREFILL_CHUNK]])  # (1, at most PREFILL_CHUNK)
        rows.append(model(part, cache)[0].astype(mx.float32))
        mx.eval(rows[-1], [array for layer in cache for array in layer.state])
    logits = mx.concatenate(rows) if len(rows) > 1 else rows[0]
    mx.eval(logits)
    model.check()
    return logits


class Step(NamedTuple):
    """One drawn token, known to the host; ``logprobs`` is empty unless asked for."""

    token: int
    logprobs: tuple[TokenLogprob, ...] = ()

    @classmethod
    def rows_of(cls, sampled: Sampled) -> list[Step]:
        """Wait for what a sampler drew for each row."""
        tokens = cast(list[int], sampled.token.tolist())
        if sampled.logprob is None or sampled.top_tokens is None or sampled.top_logprobs is None:
            return [cls(token) for token in tokens]
        reports = zip(
            tokens,
            cast(list[float], sampled.logprob.tolist()),
            cast(list[list[int]], sampled.top_tokens.tolist()),
            cast(list[list[float]], sampled.top_logprobs.tolist()),
            strict=True,
        )
        return [
            cls(token, (TokenLogprob(token, own, tuple(map(TokenLogprob, ids, values))),))
            for token, own, ids, values in reports
        ]


def no_numbers(model: Model[Any]) -> NumericError:
    """What to say of a model whose logits are not all finite."""
    if names := model.damaged():
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        return NumericError(
            f"the model's output is not finite: {', '.join(names[:4])}{more} with infinite numbers "
            "or none (NaN) among the weights",
            hint="The file is damaged: download or quantise it again",
        )
    dtype = str(model.dtype).removeprefix("mlx.core.")
    return NumericError(
        "the model's output is not finite: its weights are damaged, or too large for " + dtype,
        hint="Check the file, or try the dtype float32",
    )


def decode(
    stepper: Stepper, session: Session, sampler: Sampler, logits: mx.array, limit: int
) -> Generator[Step, None, None]:
    """Draw up to ``limit`` tokens after ``logits`` (1, V), yielding each when it is known.

    The graph of the next step is queued before this step's token is read, so that the device never
    waits for the host. Closing the iterator leaves the session with the tokens it yielded.

    Raises:
        NumericError: the logits are not all finite.
        CacheError: another request has taken the session meanwhile, or somebody took it back.
        GGUFError: the model's file has been cut short.
    """
    drawn: list[int] = []
    turn = session.turn
    finite = mx.isfinite(logits).all()
    mx.async_eval(finite)  # type: ignore[no-untyped-call]
    rows = stepper.rows(session.cache)
    current = draw(sampler, logits)
    mx.async_eval(current.arrays)  # type: ignore[no-untyped-call]
    try:
        for done in range(limit):
            upcoming = None
            session.check(turn)
            if done + 1 < limit:
                upcoming = stepper.alone(current.tokens, rows, session.cache, sampler, done)
                mx.async_eval(upcoming.arrays)  # type: ignore[no-untyped-call]
            step = Step.rows_of(current.groups[0])[0]
            stepper.model.check()
            if not drawn and not finite.item():
                raise no_numbers(stepper.model)
            drawn.append(step.token)
            yield step
            if upcoming is None:
                break
            current = upcoming
    finally:
        if session.turn == turn:
            # The last token is in the caches only if a step after it was queued.
            session.tokens.extend(drawn)
            # An interrupt may have struck between two layers: all go back to what all hold.
            held = min(cache.offset for cache in session.cache)
            session.rewind(min(held, len(session.tokens)))
