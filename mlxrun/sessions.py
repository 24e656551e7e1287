"""Sessions of one model: fresh ones, ones from files, and what they share.

Knows options and files; how a session remembers is in ``generation.engine``.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxrun.computing import COMPUTING
from mlxrun.config import DEFAULT_CACHE, CacheConfig
from mlxrun.errors import CacheError, ParameterError
from mlxrun.generation.engine import PREFILL_CHUNK, Session
from mlxrun.kv_cache import storage
from mlxrun.kv_cache.prefix_cache import PrefixCache
from mlxrun.memory.device import room
from mlxrun.model import Model

# What beginnings of prompts may take: a share of the memory that a model may take, and no more than
# so many bytes.
PREFIX_SHARE, PREFIX_BYTES = 1 / 16, 2 << 30

Tell = Callable[[str], None]


class Sessions:
    """Makes the sessions of one model.

    Args:
        model: whose they are.
        identity: which model it is; None for one that came from no file.
    """

    def __init__(self, model: Model[Any], identity: Callable[[], str] | None) -> None:
        self._model, self._identity = model, identity
        self._prefixes: PrefixCache | None = None
        self._making = threading.Lock()

    def prefixes(self, nbytes: int | None = None) -> PrefixCache:
        """The model's prefix cache, or one of its own of so many bytes."""
        if nbytes is not None:
            return PrefixCache(nbytes)
        with self._making:
            if self._prefixes is None:
                self._prefixes = PrefixCache(min(PREFIX_BYTES, int(room() * PREFIX_SHARE)))
            return self._prefixes

    def new(self, config: CacheConfig = DEFAULT_CACHE) -> Session:
        """An empty session.

        Raises:
            CacheError: the model cannot have such a cache.
        """
        return Session(
            lambda: self._model.make_cache(config),
            windowed=config.window is not None,
            owner=self._model,
            prefixes=self.prefixes(),
            identity=self._identity,
            options=config.to_dict(),
        )

    def once(self, config: CacheConfig = DEFAULT_CACHE) -> Session:
        """A session for one request: what it takes over leaves it the operations of a cold start.

        So a prompt with a seed gets the same reply whatever was asked before.
        """
        session = self.new(config)
        session.step = PREFILL_CHUNK
        return session

    def load(self, path: Path, tell: Tell, config: CacheConfig | None = None) -> Session:
        """The session of a file; an empty one if the file cannot be used.

        Args:
            tell: called with a line that says why it cannot.
            config: as it was saved with; None for the config in the file.
        """
        session = self.new(config or DEFAULT_CACHE)
        try:
            if self._identity is None:
                raise CacheError("this model came from no file, so that no file can be of it")
            with COMPUTING:
                read = storage.read(path, self._identity())
                before = self.new(CacheConfig.of(read.metadata))
                if config is None:
                    session = before
                elif _kinds(session) != _kinds(before):
                    raise CacheError("it was saved with other options", hint=storage.HINT)
                if not all(0 <= token < self._model.vocab_size for token in read.tokens):
                    raise CacheError("it holds tokens that this model has not", hint=storage.HINT)
                cache = session.make()
                read.restore(cache, lambda memories: self._model(mx.array([[0]]), memories))
        except (CacheError, ParameterError) as error:  # options that this version does not know
            tell(str(error))
            return session
        session.cache, session.tokens = cache, read.tokens
        return session


def _kinds(session: Session) -> list[Hashable]:
    """Equal for sessions that sample the same tokens; mlx-lm's caches have no batch key."""
    return [(cache.layout_key, cache.batch_key) for cache in session.cache]


def warn(line: str) -> None:
    """Say that a file was of no use, where nobody else does."""
    warnings.warn(line, stacklevel=4)
