"""Sessions on disk: a safetensors file, written atomically, with a checksum of every byte.

The header's metadata have the content as JSON and a SHA-256 of the file with that sum's own digits
as zeros. Nothing is read from a file before its sum is verified.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import mlx.core as mx

from mlxrun.errors import CacheError
from mlxrun.files import check_regular, replacing
from mlxrun.kv_cache.base import Arrays, KVCache, State

FORMAT = "mlxrun-session"
# Raised whenever an older mlxrun would misread the arrays; READABLE are those that this one reads.
VERSION, READABLE = 2, (1, 2)
_ZEROS = "0" * 64
_OURS = re.compile(rb'"format":"%s"' % FORMAT.encode())
_SUM = re.compile(rb'"checksum":"([0-9a-f]{64})"')
# A few names of arrays per layer: a longer header is not ours.
_LONGEST_HEADER = 16 << 20
# Names in the layout keys of version 1, as that spelled them.
_RENAMED = (
    ("Quantised(", "Quantized("),
    ("ByChannel(", "PerChannel("),
    ("ChannelCache ", "PerChannelCache "),
)
ELSEWHERE = "Choose another name"
HINT = "It is left as it is, and the conversation is prefilled again"


class SavedSession(NamedTuple):
    """The content of a file.

    Attributes:
        tokens: that went through the model.
        metadata: the writer's.
        layout_keys: of the caches.
        parts: K/V of the tokens in each cache.
        states: of each cache.
    """

    tokens: list[int]
    metadata: dict[str, Any]
    layout_keys: list[str]
    parts: list[Arrays]
    states: list[State | None]

    def restore(
        self, caches: Sequence[KVCache], step: Callable[[Sequence[KVCache]], object]
    ) -> None:
        """Restore empty caches.

        Args:
            step: puts one token through caches. Its graph is built twice and never evaluated.

        Raises:
            CacheError: they have other layout keys, or a step with empty caches has arrays of other
                shapes than a step with these.
        """
        if self.layout_keys != [cache.layout_key for cache in caches]:
            raise CacheError("it was saved with other options of the cache", hint=HINT)
        try:
            fresh = [cache.fork() for cache in caches]
            for cache, part, state in zip(caches, self.parts, self.states, strict=True):
                cache.restore([part], state, len(self.tokens))
            mx.eval([array for cache in caches for array in cache.state])
            ahead = [cache.fork() for cache in caches]
            step(fresh)
            step(ahead)
            if list(map(_shapes, fresh)) != list(map(_shapes, ahead)):
                raise ValueError("shapes or dtypes differ from this model's")
            if any(cache.offset != len(self.tokens) for cache in caches):
                raise ValueError("they are of another number of tokens")
        except (
            AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError
        ) as error:  # fmt: skip
            raise CacheError(f"its arrays do not fit: {error}", hint=HINT) from error


def write(
    path: Path,
    fingerprint: str,
    tokens: Sequence[int],
    caches: Sequence[KVCache],
    metadata: Mapping[str, Any],
) -> None:
    """Save caches; replaces a saved session, and no other file.

    Args:
        fingerprint: of the model, which alone may read it.
        metadata: as JSON.

    Raises:
        CacheError: the caches are empty or cannot be stored, or the file cannot be written or is
            something else.
    """
    check_replaceable(path)
    if not tokens or not all(cache.layout_key for cache in caches):
        what = "this model's KV cache cannot be saved" if tokens else "the session has no tokens"
        raise CacheError(f"{path} was not written: {what}")
    arrays: Arrays = {"tokens": mx.array(list(tokens), mx.uint32)}
    states = [cache.snapshot() for cache in caches]
    for i, (cache, state) in enumerate(zip(caches, states, strict=True)):
        arrays |= {f"{i}.tokens.{n}": a for n, a in cache.slice_tokens(0, len(tokens)).items()}
        arrays |= {f"{i}.state.{n}": a for n, a in (state.arrays if state else {}).items()}
    content = {
        "version": VERSION,
        "owner": fingerprint,
        "kinds": [cache.layout_key for cache in caches],
        "states": [state.metadata if state else None for state in states],
        "about": dict(metadata),
    }
    header = {"format": FORMAT, "checksum": _ZEROS, "content": json.dumps(content)}
    try:
        _write(path, arrays, header)
    except OSError as error:
        raise CacheError(f"cannot write {path}: {error.strerror or error}") from error
    except (RuntimeError, ValueError) as error:
        raise CacheError(f"cannot write {path}: {error}") from error


def check_replaceable(path: Path) -> None:
    """Check that a path is free or has a saved session, of any model and version, damaged or not.

    Raises:
        CacheError: it has something else, or that cannot be determined.
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


def read(path: Path, fingerprint: str) -> SavedSession:
    """The content of a file.

    Args:
        fingerprint: of the model.

    Raises:
        CacheError: there is no such file, or it is damaged, of another model or another version.
    """
    try:
        content = _checked(path)
        if content["version"] not in READABLE:
            raise CacheError(f"{path} was saved by another version of mlxrun", hint=HINT)
        if content["owner"] != fingerprint:
            raise CacheError(
                f"{path} was saved with another model, tokenizer or template", hint=HINT
            )
        arrays = mx.load(str(path), format="safetensors")
        assert isinstance(arrays, dict)
        mx.eval(list(arrays.values()))
        tokens = [int(token) for token in arrays["tokens"].tolist()]  # type: ignore[union-attr, arg-type]
        keys = list(content["kinds"])
        if content["version"] == 1:
            keys = [_renamed(key) for key in keys]
        parts = [_under(arrays, f"{i}.tokens.") for i in range(len(keys))]
        states = [
            None if metadata is None else State(_under(arrays, f"{i}.state."), metadata)
            for i, metadata in enumerate(content["states"])
        ]
        return SavedSession(tokens, dict(content["about"]), keys, parts, states)
    except OSError as error:
        raise CacheError(f"cannot read {path}: {error.strerror or error}") from error
    except (AssertionError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise CacheError(f"{path} is damaged", hint=HINT) from error


def _renamed(key: str) -> str:
    """A layout key of version 1 with the names of today."""
    for old, new in _RENAMED:
        key = key.replace(old, new)
    return key


def _shapes(cache: KVCache) -> dict[str, tuple[object, ...]]:
    """Dtype and shape of each array that would be saved, without the number of tokens."""
    state = cache.snapshot()
    arrays = cache.slice_tokens(0, 1) | (state.arrays if state else {})
    return {name: (a.dtype, a.ndim, a.shape[:2], a.shape[3:]) for name, a in arrays.items()}


def _under(arrays: Mapping[str, mx.array], prefix: str) -> Arrays:
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}


def _checked(path: Path) -> dict[str, Any]:
    """The content of a file whose checksum is right."""
    if path.exists() and not path.is_file():  # reading a pipe would block
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


def _write(path: Path, arrays: Arrays, header: dict[str, str]) -> None:
    with replacing(path, ".safetensors") as partial:
        mx.save_safetensors(str(partial), arrays, header)
        with partial.open("r+b") as file:
            head = file.read(8)
            head += file.read(int.from_bytes(head, "little"))
            found = _SUM.search(head)
            assert found is not None
            digits = _sum(head, file)
            file.seek(found.start(1))
            file.write(digits.encode())
