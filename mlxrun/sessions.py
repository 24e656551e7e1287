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

from mlxrun.cache import saved, sparsity
from mlxrun.cache.prefix import PrefixCache
from mlxrun.computing import COMPUTING
from mlxrun.errors import CacheError, ParameterError
from mlxrun.generation.engine import PREFILL_CHUNK, Session
from mlxrun.generation.parameters import Range, known
from mlxrun.memory.device import room
from mlxrun.model import Model

_LONGEST = 2**31 - 1
_LONGEST_BYTES = 2**63 - 1
# What beginnings of prompts may take: a share of the memory that a model may take, and no more than
# so many bytes.
PREFIX_SHARE, PREFIX_BYTES = 1 / 16, 2 << 30

_OPTIONS = ("window", "keep", "cache_type_k", "cache_type_v", "attention")

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
        """The model's prefix cache, or one of so many bytes.

        Raises:
            ParameterError: a negative number.
        """
        if nbytes is not None:
            checked = Range(0, _LONGEST_BYTES, whole=True).check("prefix_bytes", nbytes)
            return PrefixCache(int(checked))
        with self._making:
            if self._prefixes is None:
                self._prefixes = PrefixCache(min(PREFIX_BYTES, int(room() * PREFIX_SHARE)))
            return self._prefixes

    def new(
        self,
        *,
        window: int | None = None,
        keep: int = 0,
        cache_type_k: str | None = None,
        cache_type_v: str | None = None,
        attention: str | None = None,
        **others: Any,
    ) -> Session:
        """A session with options as :meth:`LLM.session` has them.

        Raises:
            ParameterError: no option of that name, or a value outside its range.
            CacheError: the model cannot have such a cache.
        """
        known(others, _OPTIONS)
        if window is not None:
            window = int(Range(1, _LONGEST, whole=True).check("window", window))
        keep = int(Range(0, _LONGEST, whole=True).check("keep", keep))
        window, keep, sparse = sparsity.options(attention, window, keep)
        return Session(
            lambda: self._model.make_cache(
                window=window, keep=keep, keys=cache_type_k, values=cache_type_v, sparse=sparse
            ),
            windowed=window is not None,
            owner=self._model,
            prefixes=self.prefixes(),
            identity=self._identity,
            options={
                "window": window,
                "keep": keep,
                "cache_type_k": cache_type_k,
                "cache_type_v": cache_type_v,
                "attention": attention if sparse else None,
            },
        )

    def once(self, **types: str | None) -> Session:
        """A session for one request: what it takes over leaves it the operations of a cold start.

        So a prompt with a seed gets the same reply whatever was asked before.
        """
        session = self.new(**types)  # type: ignore[arg-type]
        session.step = PREFILL_CHUNK
        return session

    def load(self, path: Path, tell: Tell, **options: Any) -> Session:
        """What a file holds; an empty session where that is of no use, and a line that says why.

        Args:
            tell: called with that line.
            options: as :meth:`new` takes them; where there are none, those that were saved.
        """
        session = self.new(**options)
        try:
            if self._identity is None:
                raise CacheError("this model came from no file, so that no file can be of it")
            with COMPUTING:
                read = saved.read(path, self._identity())
                before = self.new(**read.about)
                if not options:
                    session = before
                elif _kinds(session) != _kinds(before):
                    raise CacheError("it was saved with other options", hint=saved.HINT)
                if not all(0 <= token < self._model.vocab_size for token in read.tokens):
                    raise CacheError("it holds tokens that this model has not", hint=saved.HINT)
                cache = session.make()
                read.restore(cache, lambda memories: self._model(mx.array([[0]]), memories))
        except (CacheError, ParameterError) as error:  # options that this version does not know
            tell(str(error))
            return session
        session.cache, session.tokens = cache, read.tokens
        return session


def _kinds(session: Session) -> list[Hashable]:
    """What two sessions share if drawn tokens leave the same in both."""
    return [memory.row_kind for memory in session.cache]


def warn(line: str) -> None:
    """Say that a file was of no use, where nobody else does."""
    warnings.warn(line, stacklevel=4)
