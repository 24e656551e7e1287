"""A request in flight (:class:`Sequence`), and a pinned prefix (:class:`Session`)."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, Self

import mlx.core as mx

from mlxrun.config import DEFAULT_CACHE, CacheConfig
from mlxrun.display import table
from mlxrun.engine.blocks import Block
from mlxrun.engine.detokenize import OutputProcessor
from mlxrun.errors import CacheError, ParameterError, ProcessError
from mlxrun.kv_cache import storage
from mlxrun.kv_cache.base import KVCache
from mlxrun.kv_cache.dense import bucket
from mlxrun.kv_cache.prefix_cache import Lease, common_prefix_len
from mlxrun.kv_cache.shared_prefix import SharedPrefix, shared_prefix_of
from mlxrun.lock import device_lock
from mlxrun.model import Model
from mlxrun.outputs import Chunk, Request

if TYPE_CHECKING:
    from mlxrun.sampling.sampler import Sampler


def _free(slots: int) -> int:
    return 0


@dataclass(eq=False)
class Sequence:
    """One request in flight, from its arrival to its last chunk.

    Attributes:
        request: prompt, parameters and limits.
        limit: the most tokens to sample; 0 for one that is scored.
        cache_config: of its KV cache.
        output_processor: makes chunks of its tokens; None for one that is scored.
        kv_cost: bytes of its KV cache by number of tokens.
        session: the session that it continues, or None.
        reuse_step: prefixes are reused at multiples of so many tokens. With that of a prefill chunk
            the passes have the shapes, and so the bits, of a run without a prefix cache.
        score_from: a scored sequence yields the hidden states of positions from there on.
        score_rows: at most so many of them at once, where the model has no output matrix apart.
        streams: its reader waits for each chunk, not for the last one.
        awaits_progress: its reader reports progress before the first chunk is prefilled.
        chunks, states, error: for the reader, who waits for ``changed``.
    """

    request: Request
    limit: int
    cache_config: CacheConfig
    output_processor: OutputProcessor | None
    kv_cost: Callable[[int], int] = field(default=_free, repr=False)
    session: Session | None = None
    reuse_step: int = 1
    score_from: int | None = None
    score_rows: int | None = None
    streams: bool = True
    awaits_progress: bool = False

    # Output, read by other threads.
    chunks: list[Chunk] = field(default_factory=list, init=False)
    states: deque[tuple[int, mx.array]] = field(default_factory=deque, init=False)
    error: BaseException | None = field(default=None, init=False)
    finished: bool = field(default=False, init=False)
    changed: threading.Condition = field(default_factory=threading.Condition)
    listeners: list[Callable[[], None]] = field(default_factory=list, init=False)
    engine: SequenceOwner | None = None  # kept alive by the caller's handle until the end

    # Scheduling; see scheduler.Schedulable.
    deadline: float | None = None
    arrival: int = field(default=0, init=False)
    num_tokens: int = field(default=0, init=False)
    num_computed: int = field(default=0, init=False)
    num_reusable: int = field(default=0, init=False)
    waits_for_prefix: bool = field(default=False, init=False)
    reserved: int = field(default=0, init=False)
    reserved_slots: int = field(default=0, init=False)

    # Computation: caches of its own until it decodes, then a row of a block.
    ids: list[int] = field(default_factory=list, init=False)  # prompt and output
    num_sampled: int = field(default=0, init=False)  # tokens, those not yet read included
    sampler: Sampler | None = field(default=None, init=False)
    caches: list[KVCache] = field(default_factory=list, init=False)
    block: Block | None = field(default=None, init=False)
    row: int = field(default=0, init=False)
    token_index: int = field(default=0, init=False)  # of its token among those of the last step

    # Prefix cache.
    prefix_loaded: bool = field(default=False, init=False)
    whole_chunks: bool = field(default=True, init=False)  # prefilled alone, as after a cold start
    lease: Lease | None = field(default=None, init=False)
    store_at: set[int] = field(default_factory=set, init=False)  # lengths to store
    num_stored: int = field(default=0, init=False)
    prefix: SharedPrefix | None = field(default=None, init=False)  # shared with other sequences

    def __post_init__(self) -> None:
        self.ids = list(self.request.prompt)
        self.num_tokens = len(self.ids)

    @property
    def priority(self) -> int:
        return self.request.priority

    @property
    def num_output(self) -> int:
        """Tokens that were sampled and read."""
        return len(self.ids) - len(self.request.prompt)

    @property
    def longest(self) -> int:
        """Tokens of the prompt and of the longest output."""
        return len(self.request.prompt) + self.limit

    @property
    def can_decode(self) -> bool:
        return self.num_sampled < self.limit

    @property
    def is_prefilled(self) -> bool:
        return self.num_computed >= self.num_tokens

    @property
    def num_slots(self) -> int:
        length = self.num_computed if self.block is None else self.block.length
        return length + 1

    def cost(self, slots: int) -> int:
        slots = min(slots, self.longest)
        if self.prefix is None or slots <= self.prefix.length:
            return self.kv_cost(slots)
        saved_slots = bucket(slots) - bucket(slots - self.prefix.length)
        return self.kv_cost(slots) - saved_slots * self.prefix.nbytes // self.prefix.length

    def find_prefix(self) -> None:
        """Note the prefix that its caches share with others."""
        self.prefix = shared_prefix_of(self.caches)

    def restart(self) -> None:
        """Compute all of its tokens again, when it is admitted once more."""
        self.num_tokens, self.num_computed = len(self.ids), 0
        self.num_sampled = self.num_output
        self.whole_chunks = True

    def end(self, last: Chunk | BaseException | None) -> None:
        """Add the last chunk, or the error that it failed with."""
        if isinstance(last, BaseException):
            self.error = last
        elif last is not None:
            self.chunks.append(last)
        self.finished, self.engine, self.kv_cost = True, None, _free

    def notify(self) -> None:
        """Wake readers; not while computing, as one that waits for that may hold the lock."""
        with self.changed:
            self.changed.notify_all()
            listeners, self.listeners = self.listeners, []
        for wake in listeners:
            wake()


class SequenceOwner(Protocol):
    """The engine that runs a sequence."""

    def abort(self, sequence: Sequence) -> None: ...

    def fail(self, sequence: Sequence, error: Exception) -> None: ...

    def copies_of(self, sequence: Sequence) -> list[KVCache]: ...

    def notify(self) -> None: ...


class Session:
    """The KV cache of a conversation: the prefix that a prompt shares with it is not computed.

    A session belongs to one model and to one request at a time: a later request, or a session that
    is rewound meanwhile, ends the one before with an error.

    Args:
        model: whose caches it holds.
        config: of these caches.
        fingerprint: of the model, for files; None for a model that came from no file.

    Attributes:
        cache: the KV caches, one per layer.
        tokens: ids that they hold, in order.
    """

    def __init__(
        self,
        model: Model[Any],
        config: CacheConfig = DEFAULT_CACHE,
        fingerprint: Callable[[], str] | None = None,
    ) -> None:
        self.model, self.config = model, config
        self._fingerprint = fingerprint
        self.cache: list[KVCache] = self.empty()
        self.tokens: list[int] = []
        self._running: tuple[SequenceOwner, Sequence] | None = None

    def empty(self) -> list[KVCache]:
        """Empty caches of its kind."""
        return list(self.model.make_cache(self.config))

    @property
    def options(self) -> dict[str, Any]:
        """Its config by name, for files."""
        return self.config.to_dict()

    @property
    def windowed(self) -> bool:
        """Whether old tokens are dropped, so that the context never fills."""
        return self.config.window is not None

    @property
    def nbytes(self) -> int:
        """Bytes that the caches have allocated."""
        return sum(cache.nbytes for cache in self.cache)

    def save(self, path: str | Path) -> None:
        """Write the session to a file, to be read by ``LLM.load_session``.

        The file is bound to model, tokenizer and chat template. An existing file is replaced if it
        is a saved session, of any model; no other file is.

        Raises:
            CacheError: there is nothing to write, or the file cannot be written or is something
                else.
        """
        if self._fingerprint is None:
            raise CacheError("this session belongs to a model that came from no file")
        with device_lock:
            own = self.fork() if self._running else self
            storage.write(Path(path), self._fingerprint(), own.tokens, own.cache, self.options)

    def fork(self) -> Session:
        """A session with the same past that goes its own way from here."""
        with device_lock:
            other = Session(self.model, self.config, self._fingerprint)
            engine, sequence = self._running or (None, None)
            if engine is not None and sequence is not None and (own := engine.copies_of(sequence)):
                other.set_caches(own, sequence.ids)
            else:
                other.cache = [cache.fork() for cache in self.cache]
                other.tokens = list(self.tokens)
            return other

    def rewind(self, length: int) -> int:
        """Truncate to the first ``length`` tokens, or to none where a cache cannot be truncated.

        Returns:
            The tokens that are left.
        """
        with device_lock:
            interrupted = self.interrupt()
            self.set_caches(self.cache, self.tokens[:length])
        for engine in interrupted:
            engine.notify()
        return len(self.tokens)

    def reset(self) -> None:
        """Remove all tokens."""
        with device_lock:
            interrupted = self.interrupt()
            self.reset_caches()
        for engine in interrupted:
            engine.notify()

    def reset_caches(self) -> None:
        self.cache, self.tokens = self.empty(), []

    def common_len(self, ids: Iterable[int]) -> int:
        """How many of its tokens some ids begin with."""
        return common_prefix_len(tuple(self.tokens), tuple(ids))

    def interrupt(self) -> list[SequenceOwner]:
        """End the request that uses this session; returns its engine, to be notified."""
        if self._running is None:
            return []
        engine, sequence = self._running
        self._running = None
        engine.fail(
            sequence,
            CacheError(
                "the session of this request is used by another, or was rewound",
                hint="Give each of two streams a session of its own, or a fork",
            ),
        )
        return [engine]

    def attach(self, engine: SequenceOwner, sequence: Sequence) -> list[SequenceOwner]:
        """Let a sequence run on it; the one before ends, see :meth:`interrupt`."""
        interrupted = self.interrupt()
        self._running = engine, sequence
        return interrupted

    def detach(self, sequence: Sequence) -> None:
        """Note that a sequence has ended."""
        if self._running is not None and self._running[1] is sequence:
            self._running = None

    def set_caches(self, caches: list[KVCache], tokens: list[int]) -> None:
        """Take caches, truncated to some tokens: an interrupt may have left layers apart.

        A sequence that had not begun has none, and leaves those that there are.
        """
        if not caches:
            return
        length = min(len(tokens), *(cache.offset for cache in caches))
        try:
            for cache in caches:
                cache.truncate(0, cache.offset - length)
        except CacheError:
            caches, length = self.empty(), 0
        self.cache, self.tokens = caches, tokens[:length]

    def __repr__(self) -> str:
        tokens = len(self.tokens)
        windowed = ", with a window" if self.windowed else ""
        return f"Session({tokens} token{'s' * (tokens != 1)}{windowed})"

    def _repr_html_(self) -> str:
        options = {name: value for name, value in self.options.items() if value is not None}
        return table({"tokens": len(self.tokens), "bytes": self.nbytes, **options})

    def __reduce__(self) -> NoReturn:
        raise ProcessError(
            "a session cannot be pickled: it belongs to a model in this process",
            hint="Save it to a file for another process; fork() copies it in this one",
        )

    def __copy__(self) -> Self:
        self.__reduce__()


def load_session(
    model: Model[Any],
    path: Path,
    fingerprint: Callable[[], str] | None,
    report: Callable[[str], None],
    config: CacheConfig | None = None,
) -> Session:
    """The session of a file; an empty one if the file cannot be used.

    Args:
        report: called with the reason why it cannot.
        config: as it was saved with; None for the config in the file.
    """
    session = Session(model, config or DEFAULT_CACHE, fingerprint)
    try:
        if fingerprint is None:
            raise CacheError("this model came from no file, so that no file can be of it")
        with device_lock:
            read = storage.read(path, fingerprint())
            before = Session(model, CacheConfig.of(read.metadata), fingerprint)
            if config is None:
                session = before
            elif _kinds(session) != _kinds(before):
                raise CacheError("it was saved with other options", hint=storage.HINT)
            if not all(0 <= token < model.vocab_size for token in read.tokens):
                raise CacheError("it has tokens that this model does not have", hint=storage.HINT)
            caches = session.empty()
            read.restore(caches, lambda own: model.forward(mx.array([[0]]), own))
    except (CacheError, ParameterError) as error:  # options that this version does not know
        report(str(error))
        return session
    session.cache, session.tokens = caches, read.tokens
    return session


def _kinds(session: Session) -> list[Hashable]:
    """Equal for sessions that sample the same tokens; mlx-lm's caches have no batch key."""
    return [(cache.layout_key, cache.batch_key) for cache in session.cache]
