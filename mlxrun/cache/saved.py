"""Memories in a file: one safetensors file, written whole or not at all, whose every byte counts.

The header's metadata say what the file is of, and hold a SHA-256 of the file in which its own
digits are zeros. Nothing is taken from a file before that sum is right. Knows neither models nor
tokens' meaning: what a file must be of is told by a string.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import mlx.core as mx

from mlxrun.cache.base import Memory, Named, State
from mlxrun.errors import CacheError
from mlxrun.files import check_regular, replacing

FORMAT = "mlxrun-session"
# Raised whenever a cache would read another's arrays differently.
VERSION = 1
_ZEROS = "0" * 64
_OURS = re.compile(rb'"format":"%s"' % FORMAT.encode())
_SUM = re.compile(rb'"checksum":"([0-9a-f]{64})"')
# A header with the names of some arrays a layer: more is no file of ours.
_LONGEST_HEADER = 16 << 20
ELSEWHERE = "Choose another name"
HINT = "It is left as it is, and the conversation is read again"


class Saved(NamedTuple):
    """What a file holds.

    Attributes:
        tokens: that went through the model.
        about: what the writer wanted to know.
        kinds: of the memories.
        parts: what tokens left in each memory.
        states: what each memory held besides.
    """

    tokens: list[int]
    about: dict[str, Any]
    kinds: list[str]
    parts: list[Named]
    states: list[State | None]

    def restore(
        self, memories: Sequence[Memory], step: Callable[[Sequence[Memory]], object]
    ) -> None:
        """Put it into empty memories.

        Args:
            step: puts one token through memories. Its graph is built twice and never evaluated.

        Raises:
            CacheError: they are of other kinds, or a step from empty memories leaves other arrays
                than a step from these does.
        """
        if self.kinds != [memory.kind for memory in memories]:
            raise CacheError("it was saved with other options of the cache", hint=HINT)
        try:
            fresh = [memory.fork() for memory in memories]
            for memory, part, state in zip(memories, self.parts, self.states, strict=True):
                memory.restore([part], state, len(self.tokens))
            mx.eval([array for memory in memories for array in memory.state])
            ahead = [memory.fork() for memory in memories]
            step(fresh)
            step(ahead)
            if list(map(_layout, fresh)) != list(map(_layout, ahead)):
                raise ValueError("shapes or dtypes differ from this model's")
            if any(memory.offset != len(self.tokens) for memory in memories):
                raise ValueError("they are of another number of tokens")
        except (
            AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError
        ) as error:  # fmt: skip
            raise CacheError(f"its arrays do not fit: {error}", hint=HINT) from error


def write(
    path: Path,
    owner: str,
    tokens: Sequence[int],
    memories: Sequence[Memory],
    about: Mapping[str, Any],
) -> None:
    """Write what memories hold of tokens; replaces a saved session, and no other file.

    Args:
        owner: what only may read it.
        about: JSON.

    Raises:
        CacheError: they hold nothing, cannot be kept, or the file cannot be written or is something
            else.
    """
    check_replaceable(path)
    if not tokens or not all(memory.kind for memory in memories):
        what = "this model's memory cannot be kept" if tokens else "there is nothing to remember"
        raise CacheError(f"{path} was not written: {what}")
    arrays: Named = {"tokens": mx.array(list(tokens), mx.uint32)}
    abouts: list[dict[str, Any] | None] = []
    for i, memory in enumerate(memories):
        state = memory.snapshot()
        abouts.append(state.about if state else None)
        arrays |= {f"{i}.tokens.{n}": a for n, a in memory.cut(0, len(tokens)).items()}
        arrays |= {f"{i}.state.{n}": a for n, a in (state.arrays if state else {}).items()}
    content = {
        "version": VERSION,
        "owner": owner,
        "kinds": [memory.kind for memory in memories],
        "states": abouts,
        "about": dict(about),
    }
    metadata = {"format": FORMAT, "checksum": _ZEROS, "content": json.dumps(content)}
    try:
        _write(path, arrays, metadata)
    except OSError as error:
        raise CacheError(f"cannot write {path}: {error.strerror or error}") from error
    except (RuntimeError, ValueError) as error:
        raise CacheError(f"cannot write {path}: {error}") from error


def check_replaceable(path: Path) -> None:
    """Whether a session may be written to a path: there is nothing yet, or a saved session.

    A session of any model and version counts, damaged or not.

    Raises:
        CacheError: there is something else, or it cannot be told what.
    """
    try:
        check_regular(path)
        if not path.exists():
            return
        with path.open("rb") as file:
            _head(path, file)
    except OSError as error:
        raise CacheError(f"cannot write {path}: {error.strerror or error}") from error
    except CacheError as error:
        raise CacheError(
            f"{path} was not replaced: it is no saved session", hint=ELSEWHERE
        ) from error


def read(path: Path, owner: str) -> Saved:
    """What a file holds.

    Args:
        owner: who reads it.

    Raises:
        CacheError: there is no such file, or it is damaged, of another owner or another version.
    """
    try:
        content = _checked(path)
        if content["version"] != VERSION:
            raise CacheError(f"{path} was saved by another version of mlxrun", hint=HINT)
        if content["owner"] != owner:
            raise CacheError(
                f"{path} was saved with another model, tokenizer or template", hint=HINT
            )
        arrays = mx.load(str(path), format="safetensors")
        assert isinstance(arrays, dict)
        mx.eval(list(arrays.values()))
        tokens = [int(token) for token in arrays["tokens"].tolist()]  # type: ignore[union-attr, arg-type]
        kinds = list(content["kinds"])
        parts = [_under(arrays, f"{i}.tokens.") for i in range(len(kinds))]
        states = [
            None if about is None else State(_under(arrays, f"{i}.state."), about)
            for i, about in enumerate(content["states"])
        ]
        return Saved(tokens, dict(content["about"]), kinds, parts, states)
    except OSError as error:
        raise CacheError(f"cannot read {path}: {error.strerror or error}") from error
    except (AssertionError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise CacheError(f"{path} is damaged", hint=HINT) from error


def _layout(memory: Memory) -> dict[str, tuple[object, ...]]:
    """Dtype and shape of each array that would be saved; the number of tokens is left out."""
    state = memory.snapshot()
    arrays = memory.cut(0, 1) | (state.arrays if state else {})
    return {name: (a.dtype, a.ndim, a.shape[:2], a.shape[3:]) for name, a in arrays.items()}


def _under(arrays: Mapping[str, mx.array], prefix: str) -> Named:
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}


def _checked(path: Path) -> dict[str, Any]:
    """The content of a file's metadata, if the file is what was written."""
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise CacheError(f"{path} is no saved session", hint=HINT)
    with path.open("rb") as file:
        head = _head(path, file)
        found = _SUM.search(head)
        if found is None or _sum(head, file) != found[1].decode():
            raise CacheError(f"{path} is damaged", hint=HINT)
    content: dict[str, Any] = json.loads(json.loads(head[8:])["__metadata__"]["content"])
    return content


def _head(path: Path, file: BinaryIO) -> bytes:
    """The length and the header of a saved session."""
    head = file.read(8)
    length = int.from_bytes(head, "little")
    if len(head) == 8 and length <= _LONGEST_HEADER:
        head += file.read(length)
        if _OURS.search(head):
            return head
    raise CacheError(f"{path} is no saved session", hint=HINT)


def _sum(head: bytes, rest: BinaryIO) -> str:
    """The sum of a file whose header has been read."""
    whole = hashlib.sha256(_SUM.sub(b'"checksum":"' + _ZEROS.encode() + b'"', head, count=1))
    while block := rest.read(1 << 20):
        whole.update(block)
    return whole.hexdigest()


def _write(path: Path, arrays: Named, metadata: dict[str, str]) -> None:
    with replacing(path, ".safetensors") as partial:
        mx.save_safetensors(str(partial), arrays, metadata)
        with partial.open("r+b") as file:
            head = file.read(8)
            head += file.read(int.from_bytes(head, "little"))
            found = _SUM.search(head)
            assert found is not None
            digits = _sum(head, file)
            file.seek(found.start(1))
            file.write(digits.encode())
