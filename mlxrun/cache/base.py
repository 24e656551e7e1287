"""The contract between a model and what it remembers.

:class:`Memory` is all that sessions and the engine know: a place in time that can go back and fork.
:class:`Cache` is the memory of one layer of our transformer. Classes of other libraries bring
caches of their own, behind a :class:`Memory` for the whole model.

One cache serves one layer and every row of a batch. Who owns what, and for how long:

* The cache owns its arrays. ``update`` appends to them; nothing else changes them.
* What ``update`` returns is valid for the forward pass that called it: views of the cache's arrays
  in slot order, which need not be the order of time. Keep nothing from one step to the next.
* ``fork`` shares arrays between two caches. MLX arrays are values: the first of the two to be
  updated copies what it changes, so neither can see the other's tokens.
* All of it is lazy: building the graph of the next step before this one is evaluated is fine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, Self

import mlx.core as mx

from mlxrun.cache.formats import Mixed, Shown
from mlxrun.errors import CacheError

Mask = mx.array | str | None
Named = dict[str, mx.array]
Position = int | mx.array


def following(position: Position, tokens: int) -> mx.array:
    """The positions of T tokens from one on, (T,), or from each row's, (B, T)."""
    if isinstance(position, int):
        return mx.arange(position, position + tokens)
    return position[:, None] + mx.arange(tokens)


class Product(ABC):
    """How queries meet keys and values: what a layer computes over what its cache holds.

    Attributes:
        latent: values are keys as well: a query's first numbers meet keys, the others values.
    """

    latent = False

    @abstractmethod
    def __call__(self, q: mx.array, k: mx.array, v: mx.array, mask: Mask) -> mx.array:
        """Queries (B, heads, T, D), keys and values (B, H, S, D) to (B, heads, T, D)."""

    @abstractmethod
    def stored(self, q: mx.array, keys: Shown, values: Mixed, mask: Mask) -> mx.array:
        """The same over keys and values as they are stored, which are not unpacked."""

    def ranking(self, q: mx.array) -> mx.array:
        """Queries whose plain products with keys (beside values, if latent) rank them as scores."""
        return q


class State(NamedTuple):
    """What a memory holds at one place in time, besides what each token left behind.

    Attributes:
        arrays: by name; nobody writes into them.
        about: the rest, as JSON has it.
    """

    arrays: Named
    about: dict[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(int(array.nbytes) for array in self.arrays.values())


class Memory(ABC):
    """What a model, or a layer of it, remembers of the tokens so far.

    Attributes:
        offset: tokens seen so far; the position of the next one.
        prompt: the first so many tokens are a prompt's, which whoever reads it says before. What
            shows drawn tokens less than it holds goes by it.
    """

    offset: int = 0
    prompt: int = 0

    @abstractmethod
    def trim(self, n: int) -> int:
        """Forget the last ``n`` tokens of every row; returns n.

        Raises:
            CacheError: what going back would need is no longer there.
        """

    def truncate(self, row: int, n: int) -> None:
        """Forget the last ``n`` tokens of one row.

        Raises:
            CacheError: what going back would need is no longer there.
        """
        assert row == 0, "a cache of a single sequence"
        self.trim(n)

    @abstractmethod
    def fork(self) -> Self:
        """A memory with the same contents that goes its own way from here."""

    @property
    def settled(self) -> int:
        """How many of the first tokens left what they leave wherever they begin a prompt."""
        return self.offset

    @property
    def kind(self) -> str:
        """What two memories share if one can take over what the other held; empty: none can."""
        return ""

    @property
    def row_kind(self) -> Hashable:
        """What two memories share if they may be rows of the same arrays."""
        return self.kind

    @property
    def by_token(self) -> bool:
        """Whether all that it holds can be told apart by token, so that it has no state."""
        return False

    def cut(self, start: int, stop: int) -> Named:
        """Copies of what tokens left behind, arrays (1, H, stop - start, ...); none in a state."""
        raise CacheError("this kind of memory cannot be kept")

    def snapshot(self) -> State | None:
        """What it holds now besides; None where everything can be told apart by token."""
        raise CacheError("this kind of memory cannot be kept")

    def restore(self, tokens: Sequence[Named], state: State | None, length: int) -> None:
        """Remember what another memory of its kind did; this one is empty.

        Args:
            tokens: what the first ``length`` tokens left behind, or more, in successive parts.
            state: of a place in time from which going back to ``length`` works.

        Raises:
            CacheError: it does not work from there.
        """
        raise CacheError("this kind of memory cannot be kept")

    @property
    @abstractmethod
    def state(self) -> list[mx.array]:
        """The arrays to evaluate so that nothing of this memory stays unevaluated."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(int(array.nbytes) for array in self.state)


class Cache(Memory):
    """Keys and values of one layer."""

    @property
    def position(self) -> Position:
        """The position of the next token, or of each row's, (B,)."""
        return self.offset

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, product: Product
    ) -> mx.array:
        """Append T tokens and attend to all that they see.

        Args:
            queries: (B, heads, T, D).
            keys, values: as :meth:`update` takes them.
            product: how they meet.

        Returns:
            (B, heads, T, D).
        """
        return product(queries, *self.update(keys, values))

    @abstractmethod
    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array, Mask]:
        """Append T tokens and return what they attend to.

        Args:
            keys: (B, H, T, D), already rotated by position.
            values: (B, H, T, D).

        Returns:
            Keys and values (B, H, S, D) and the mask for ``scaled_dot_product_attention``: None
            (every query sees every key), ``"causal"`` (aligned at the lower right), or booleans
            (T, S) or, where rows have offsets of their own, (B, 1, T, S).
        """
