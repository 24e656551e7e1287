"""Architectures with a state instead of, or beside, keys and values."""

from __future__ import annotations

from converters.gguf.architectures.row import Architecture

RECURRENT: dict[str, Architecture] = {}
