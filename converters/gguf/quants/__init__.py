"""One small class per GGML block type: how its blocks become integer codes on a lattice."""

from __future__ import annotations

from converters.gguf.quants import iq, k, plain
from converters.gguf.quants.base import CODECS, Codec, Codes, Products

__all__ = ["CODECS", "Codec", "Codes", "Products", "iq", "k", "plain"]
