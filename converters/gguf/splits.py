"""Split files: ``name-00001-of-00003.gguf`` and its siblings, read and validated as one set.

The ``split.*`` keys are those of llama-gguf-split; the first shard has all other metadata.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from converters.errors import GGUFError
from converters.gguf.file import Shard
from converters.gguf.header import read_shard
from converters.gguf.types import show

__all__ = ["read_shards"]

NUMBER: Final = "split.no"  # from 0, while file names count from 1
COUNT: Final = "split.count"
TENSORS: Final = "split.tensors.count"  # in all shards together
MAX_SHARDS: Final = 99_999  # what the name has room for

_NAME: Final = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def read_shards(path: Path) -> tuple[Shard, ...]:
    """The shards of the set that ``path`` belongs to, in order; one if it is not split.

    Any shard opens its set: the siblings are found by name, in the same directory.

    Raises:
        GGUFError: a shard is missing or malformed, or the shards do not belong together.
    """
    given = read_shard(path)
    count = _integer(given, COUNT, 0, MAX_SHARDS) if COUNT in given.metadata else 0
    if count < 2:  # merging writes 0
        return (given,)
    number = _integer(given, NUMBER, 0, count - 1)
    name = _NAME.fullmatch(path.name)
    if name is None or (int(name["number"]), int(name["count"])) != (number + 1, count):
        expected = f"a file named ...-{number + 1:05d}-of-{count:05d}.gguf"
        hint = "Give the shards of a split file their original names"
        raise _error(given, NUMBER, expected, show(path.name), hint)
    shards = []
    for index in range(count):
        sibling = path.with_name(f"{name['stem']}-{index + 1:05d}-of-{count:05d}.gguf")
        shards.append(given if index == number else _sibling(sibling, index, count))
    _check_tensors(shards)
    return tuple(shards)


def _sibling(path: Path, index: int, count: int) -> Shard:
    """Shard ``index`` of ``count``, as its own keys must say."""
    if not path.exists():
        raise GGUFError(
            path,
            field="file",
            offset=0,
            expected=f"shard {index + 1} of {count}",
            found="nothing at this path",
            hint="Download the missing shard into the same directory",
        )
    shard = read_shard(path)
    for key, value in ((COUNT, count), (NUMBER, index)):
        if _number(shard, key) != value:
            raise _error(
                shard, key, str(value), _found(shard, key), "The shards are not of one set"
            )
    return shard


def _check_tensors(shards: list[Shard]) -> None:
    """Raise unless the shards have the stated number of tensors, without duplicates."""
    where: dict[str, Path] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if tensor.name in where:
                found = f"a second one (the first is in {where[tensor.name].name})"
                raise tensor.error(expected="each name once in all shards", found=found)
            where[tensor.name] = shard.path
    for shard in shards:
        if TENSORS in shard.metadata or shard is shards[0]:
            promised = _integer(shard, TENSORS, 0, 2**31 - 1)
            if promised != len(where):
                raise _error(shard, TENSORS, f"{len(where)}, the tensors found", str(promised))


def _number(shard: Shard, key: str) -> int | None:
    """The key's value if it is an integer."""
    value = shard.metadata.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _integer(shard: Shard, key: str, low: int, high: int) -> int:
    value = _number(shard, key)
    if value is not None and low <= value <= high:
        return value
    raise _error(shard, key, f"an integer from {low} to {high}", _found(shard, key))


def _found(shard: Shard, key: str) -> str:
    return show(shard.metadata[key]) if key in shard.metadata else "no such key"


def _error(shard: Shard, key: str, expected: str, found: str, hint: str | None = None) -> GGUFError:
    return GGUFError(
        shard.path,
        field=key,
        offset=shard.offsets.get(key, shard.metadata_end),
        expected=expected,
        found=found,
        hint=hint,
    )
