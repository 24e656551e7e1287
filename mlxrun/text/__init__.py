"""Tokenizers, chat templates, streaming detokenizer, stop strings; never imports MLX."""

from __future__ import annotations

from mlxrun.text.detokenizer import StreamingDetokenizer
from mlxrun.text.stops import StopMatcher
from mlxrun.text.template import ChatTemplate
from mlxrun.text.tokenizer import Tokenizer, load_tokenizer

__all__ = ["ChatTemplate", "StopMatcher", "StreamingDetokenizer", "Tokenizer", "load_tokenizer"]
