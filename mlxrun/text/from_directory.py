"""A tokenizer's parts from a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

from mlxrun.errors import TokenizerError
from mlxrun.text.tokenizer import TokenizerParts

__all__ = ["directory_parts"]


def directory_parts(path: Path) -> TokenizerParts:
    """The parts of a directory's tokenizer; raises TokenizerError."""
    raise TokenizerError(f"{path}: model directories are not read yet")
