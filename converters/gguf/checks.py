"""Metadata that lies: values that no model can have, found before anything relies on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from converters.gguf.reader import GGUFFile

__all__ = ["check"]


def check(file: GGUFFile) -> None:
    """Raise GGUFError for the first value that is impossible."""
    if not isinstance(file.get("general.architecture"), str):
        raise file.error("general.architecture", expected="a string naming the model's family")
