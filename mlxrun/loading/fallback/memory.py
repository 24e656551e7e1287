"""mlx-lm's caches behind our contract: one memory for a whole model.

mlx-lm's caches differ in what they can do. Some trim, some drop what lies behind a window, some
hold a state that cannot be run backwards; not all count their tokens. So the memory counts, and
before each step of one token it saves what is needed to go back over it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import mlx.core as mx
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    RotatingKVCache,
)

from mlxrun.cache.base import Memory, Named, State
from mlxrun.errors import CacheError
from mlxrun.loading.fallback import kept


class ForeignMemory(Memory):
    """What a class of mlx-lm remembers.

    Args:
        entries: mlx-lm's caches, as its class wants them. They belong to the memory.
    """

    def __init__(self, entries: list[Any]) -> None:
        self.entries = entries
        self.offset = 0
        # What each entry needs to go back over the last step, if that was of one token.
        self._before: list[Any] | None = None
        self._torn = False

    @contextmanager
    def step(self, tokens: int) -> Iterator[list[Any]]:
        """The entries for one forward pass over so many tokens."""
        if self._torn:
            raise CacheError("an interrupted pass has left this memory in pieces")
        self._before = [_saved(entry) for entry in self.entries] if tokens == 1 else None
        self._torn = True
        yield self.entries
        if tokens > 1:
            self._own_states()
        self._torn = False
        self.offset += tokens

    def _own_states(self) -> None:
        """Copy states that are slices: each would hold on to what a whole pass computed."""
        for part in kept.parts(self.entries):
            if isinstance(part, ArraysCache):
                part.cache = [each if each is None else mx.contiguous(each) for each in part.cache]

    def compute_states(self) -> None:
        """Queue recurrent states layer by layer.

        Asked for together they are computed last, and until then every layer holds what its own is
        made of.
        """
        for part in kept.parts(self.entries):
            if isinstance(part, ArraysCache):
                mx.async_eval(list(arrays_in(part)))  # type: ignore[no-untyped-call]

    def trim(self, n: int) -> int:
        if not 0 <= n <= self.offset:
            raise CacheError(f"cannot forget {n} of {self.offset} tokens")
        if self._torn:
            self._back()
        if n == 0:
            return 0
        if all(_can_trim(entry, n) for entry in self.entries):
            for entry in self.entries:
                entry.trim(n)
            self._before = None
        elif n == 1 and self._before is not None:
            self._back()
        else:
            raise CacheError(f"the state of this model cannot go back {n} tokens")
        self.offset -= n
        return n

    def _back(self) -> None:
        """Undo the last step of one token."""
        if self._before is None:
            raise CacheError("an interrupted pass has left this memory in pieces")
        for entry, saved in zip(self.entries, self._before, strict=True):
            _restore(entry, saved)
        self._before, self._torn = None, False

    def fork(self) -> Self:
        # A deep copy of an MLX array is another handle to the same values: what one of the two
        # assigns to a slice stays its own.
        return copy.deepcopy(self)

    @property
    def kind(self) -> str:
        kinds = [kept.kind(part) for part in kept.parts(self.entries)]
        return "; ".join(kinds) if all(kinds) else ""

    @property
    def by_token(self) -> bool:
        return all(kept.by_token(part) for part in kept.parts(self.entries))

    def cut(self, start: int, stop: int) -> Named:
        return {
            f"{i}.{name}": array
            for i, part in enumerate(kept.parts(self.entries))
            if kept.by_token(part)
            for name, array in kept.cut(part, start, stop).items()
        }

    def snapshot(self) -> State | None:
        if self.by_token:
            return None
        arrays: Named = {}
        about = {
            str(i): {
                name: kept.taken(value, arrays, f"{i}.{name}.")
                for name, value in vars(part).items()
            }
            for i, part in enumerate(kept.parts(self.entries))
            if not kept.by_token(part)
        }
        return State(arrays, {"offset": self.offset, "parts": about})

    def restore(self, tokens: Sequence[Named], state: State | None, length: int) -> None:
        back = int(state.about["offset"]) - length if state else 0
        for i, part in enumerate(kept.parts(self.entries)):
            if kept.by_token(part):
                kept.put(part, tokens, f"{i}.", length)
                continue
            assert state is not None
            for name, value in state.about["parts"][str(i)].items():
                setattr(part, name, kept.given(value, state.arrays))
            if back and not _can_trim(part, back):
                raise CacheError(f"the state of this model cannot go back {back} tokens")
            if back:
                part.trim(back)
        self.offset = length

    @property
    def state(self) -> list[mx.array]:
        return list(arrays_in(self.entries))

    @property
    def nbytes(self) -> int:
        """Bytes allocated, those of what going back over the last step takes among them."""
        held = {id(array): array for array in arrays_in([self.entries, self._before])}
        return sum(int(array.nbytes) for array in held.values())


def arrays_in(value: Any) -> Iterator[mx.array]:
    """All arrays within caches, of whatever class."""
    if isinstance(value, mx.array):
        yield value
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for part in value:
            yield from arrays_in(part)
    elif isinstance(value, dict):
        yield from arrays_in(list(value.values()))
    elif hasattr(value, "__dict__"):
        yield from arrays_in(list(vars(value).values()))


def _can_trim(entry: Any, n: int) -> bool:
    """Whether an entry holds what it needs to go back by its own means."""
    if isinstance(entry, CacheList):
        return all(_can_trim(part, n) for part in entry.caches)
    if isinstance(entry, ChunkedKVCache):
        # Attention reaches back to the start of the chunk.
        position = entry.offset - n
        return bool(position - position % entry.chunk_size >= entry.start_position)
    return bool(entry.is_trimmable())


def _saved(entry: Any) -> Any:
    """What going back over the coming step needs of an entry: attributes as they are now."""
    if isinstance(entry, CacheList):
        return [_saved(part) for part in entry.caches]
    if isinstance(entry, KVCache | ChunkedKVCache):
        return {"offset": entry.offset}  # what is behind the offset is not read
    if isinstance(entry, RotatingKVCache) and entry.offset < entry.max_size:
        return {"offset": entry.offset, "_idx": entry._idx}
    if isinstance(entry, ArraysCache):
        return {"cache": list(entry.cache)}  # states are replaced, never written into
    # A full window is written into: with a second handle to its arrays, MLX copies them first, as
    # it does anyway while the step before is still being computed.
    return copy.deepcopy(vars(entry))


def _restore(entry: Any, saved: Any) -> None:
    if isinstance(entry, CacheList):
        for part, own in zip(entry.caches, saved, strict=True):
            _restore(part, own)
    else:
        vars(entry).update(saved)
