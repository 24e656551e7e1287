"""Tokenizers, chat templates, streaming detokenizer, stop strings; never imports MLX."""

from __future__ import annotations

from mlxrun.tokenizer.chat_template import ChatTemplate
from mlxrun.tokenizer.detokenizer import StopMatcher, StreamingDetokenizer
from mlxrun.tokenizer.tokenizer import Tokenizer, load_tokenizer

__all__ = ["ChatTemplate", "StopMatcher", "StreamingDetokenizer", "Tokenizer", "load_tokenizer"]
