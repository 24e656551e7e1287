"""Cut a piece of plain text into tokens: one encoder per kind of vocabulary.

An encoder gets text without special tokens in it and returns ids; it never returns a control token.
Who finds special tokens and adds BOS is ``tokenizer.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Protocol

import tokenizers

from converters.gguf.pretokenizers import PreTokenizer
from converters.gguf.sentencepiece_model import model_proto
from converters.gguf.tokenizer import bpe_pipeline, known_merges
from converters.gguf.vocabulary import TokenType, Vocabulary
from mlxrun.errors import TokenizerError
from mlxrun.text.pieces import BYTE_ALPHABET

__all__ = ["BPEEncoder", "Encoder", "SPMEncoder", "encoder_of"]


_NOTHING: Final = "\ufffd<nothing>"


class Encoder(Protocol):
    """Text without special tokens -> ids."""

    def __call__(self, text: str, first: bool) -> list[int]:
        """Encode a piece; ``first`` says that nothing comes before it."""
        ...


def encoder_of(vocabulary: Vocabulary) -> Encoder:
    """The encoder for a vocabulary; raises TokenizerError where there is none."""
    if vocabulary.kind == "spm":
        return SPMEncoder(vocabulary)
    if vocabulary.pre is not None:
        return BPEEncoder(vocabulary, vocabulary.pre)
    raise TokenizerError(f"vocabularies of kind {vocabulary.kind!r} are not supported yet")


class SPMEncoder:
    """sentencepiece on a model assembled from the vocabulary."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        import sentencepiece

        self._prefix = " " if vocabulary.add_space_prefix else ""
        self._size = len(vocabulary.tokens)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model_proto(vocabulary))
        except RuntimeError as reason:
            raise TokenizerError(f"sentencepiece refuses the vocabulary: {reason}") from None

    def __call__(self, text: str, first: bool) -> list[int]:
        ids: list[int] = self._model.encode(self._prefix + text, out_type=int)
        return [index for index in ids if index < self._size]


class BPEEncoder:
    """The ``tokenizers`` library with the pre-tokenizer that the vocabulary names."""

    def __init__(self, vocabulary: Vocabulary, pre: PreTokenizer) -> None:
        hidden = (TokenType.CONTROL, TokenType.UNKNOWN)
        vocab = {
            token: index
            for index, (token, type_) in enumerate(
                zip(vocabulary.tokens, vocabulary.types, strict=True)
            )
            if type_ not in hidden
        }
        self._size = len(vocabulary.tokens)
        # What is no token must still keep its neighbours apart: ids past the end, dropped later.
        missing = [c for c in BYTE_ALPHABET if c not in vocab] if pre.byte_level else [_NOTHING]
        vocab |= {text: self._size + index for index, text in enumerate(missing)}
        self._tokenizer = _pipeline(pre)
        self._tokenizer.model = _bpe(vocab, vocabulary.merges, pre)
        self._cut: Callable[[str], Iterator[str]] = _thirds if pre.digits_from_right else _whole

    def __call__(self, text: str, first: bool) -> list[int]:
        ids: list[int] = []
        for part in self._cut(text):
            ids += self._tokenizer.encode(part, add_special_tokens=False).ids
        return [index for index in ids if index < self._size]


def _bpe(
    vocab: dict[str, int], merges: Sequence[tuple[str, str]], pre: PreTokenizer
) -> tokenizers.models.BPE:
    def build(merges: Sequence[tuple[str, str]]) -> tokenizers.models.BPE:
        return tokenizers.models.BPE(
            vocab,
            list(merges),
            ignore_merges=pre.ignore_merges,
            byte_fallback=not pre.byte_level,
            unk_token=None if pre.byte_level else _NOTHING,
        )

    try:
        return build(merges)
    except Exception:  # the library has no type of its own: a merge names no token
        return build(known_merges(list(vocab), merges))


def _pipeline(pre: PreTokenizer) -> tokenizers.Tokenizer:
    document: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "post_processor": None,
        **bpe_pipeline(pre),
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    return tokenizers.Tokenizer.from_str(json.dumps(document))


_LONG_RUN: Final = re.compile(r"\d{1200,}")
_STEP: Final = 600


def _whole(text: str) -> Iterator[str]:
    yield text


def _thirds(text: str) -> Iterator[str]:
    """Cut long runs of digits a multiple of three from their end, where the pattern cuts anyway.

    The pattern looks from every group to the end of its run: quadratic without this.
    """
    start = 0
    for run in _LONG_RUN.finditer(text):
        for cut in range(run.start() + (run.end() - run.start()) % 3 + _STEP, run.end(), _STEP):
            yield text[start:cut]
            start = cut
    yield text[start:]
