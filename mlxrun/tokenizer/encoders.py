"""Encoders of plain text, one per kind of vocabulary; none returns a control token."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from typing import Any, Final, Protocol, SupportsIndex

import tokenizers

from converters.gguf.vocab import PreTokenizer, TokenType, Vocabulary, spelled
from converters.huggingface.tokenizer_files import bpe_pipeline, known_merges, model_proto
from mlxrun.errors import TokenizerError

__all__ = ["BYTE_ALPHABET", "Encoder", "LibraryEncoder", "Pieces", "encoder_of", "kept_apart"]


_NOTHING: Final = "\ufffd<nothing>"
_BPE_OPTIONS: Final = (
    "unk_token",
    "fuse_unk",
    "byte_fallback",
    "ignore_merges",
    "continuing_subword_prefix",
    "end_of_word_suffix",
)


class Encoder(Protocol):
    def __call__(self, text: str, first: bool) -> list[int]:
        """Encode plain text; ``first`` if nothing precedes it."""
        ...


def encoder_of(vocabulary: Vocabulary) -> Encoder:
    if vocabulary.kind in ("spm", "unigram"):
        return SPMEncoder(vocabulary)
    if vocabulary.pre is not None:
        return BPEEncoder(vocabulary, vocabulary.pre)
    raise TokenizerError(f"vocabularies of kind {vocabulary.kind!r} are not supported yet")


class SPMEncoder:
    """sentencepiece with a model assembled from the vocabulary."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        import sentencepiece

        spm = vocabulary.kind == "spm"  # a unigram model's own normalizer sees to the prefix
        self._prefix = " " if spm and vocabulary.add_space_prefix else ""
        self._size = len(vocabulary.tokens)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model_proto(vocabulary))
        except (RuntimeError, ValueError, OSError) as reason:
            raise TokenizerError(f"sentencepiece refuses the vocabulary: {reason}") from None

    def __call__(self, text: str, first: bool) -> list[int]:
        ids: list[int] = self._model.encode(self._prefix + text, out_type=int)
        return [index for index in ids if index < self._size]


class BPEEncoder:
    """The ``tokenizers`` library with the pre-tokenizer that the vocabulary names."""

    def __init__(self, vocabulary: Vocabulary, pre: PreTokenizer) -> None:
        hidden = (TokenType.CONTROL, TokenType.UNKNOWN)
        rows = zip(spelled(vocabulary.tokens), vocabulary.types, strict=True)
        vocab = {text: index for index, (text, type_) in enumerate(rows) if type_ not in hidden}
        self._size = len(vocabulary.tokens)
        model = {
            "type": "BPE",
            "vocab": vocab,
            "merges": vocabulary.merges,
            "ignore_merges": pre.ignore_merges,
            "byte_fallback": not pre.byte_level,
        }
        model = kept_apart(model, self._size, pre.byte_level)
        self._tokenizer = assemble({**bpe_pipeline(pre), "model": model})
        self._cut: Callable[[str], Iterator[str]] = (
            _digit_cutter(pre.digits_from_right) if pre.digits_from_right else _whole
        )

    def __call__(self, text: str, first: bool) -> list[int]:
        ids: list[int] = []
        with _library_errors("fails on this text"):
            for part in self._cut(text):
                ids += self._tokenizer.encode(part, add_special_tokens=False).ids
        return [index for index in ids if index < self._size]


class LibraryEncoder:
    """The ``tokenizers`` library on a ``tokenizer.json``.

    Args:
        document: the file's contents, without added tokens and post-processor.
        rest: the same for text after the first part, if that differs.
        size: of the vocabulary; ids past it are dropped.
    """

    def __init__(
        self, document: Mapping[str, Any], rest: Mapping[str, Any] | None, size: int
    ) -> None:
        self._first = assemble(document)
        self._rest = self._first if rest is None else assemble(rest)
        self._size = size

    def __call__(self, text: str, first: bool) -> list[int]:
        tokenizer = self._first if first else self._rest
        with _library_errors("fails on this text"):
            ids = tokenizer.encode(text, add_special_tokens=False).ids
        return [index for index in ids if index < self._size]


def kept_apart(model: Mapping[str, Any], size: int, byte_level: bool) -> dict[str, Any]:
    """A BPE model with ids past the end for bytes or characters without a token.

    llama.cpp drops those after merging, the ``tokenizers`` library before, which joins their
    neighbors. A model's own unknown token stays.
    """
    vocab = dict(model["vocab"])
    if byte_level:
        missing = [text for text in BYTE_ALPHABET if text not in vocab]
        vocab |= {text: size + index for index, text in enumerate(missing)}
        return {**model, "vocab": vocab}
    if model.get("unk_token") is not None:
        return dict(model)
    return {**model, "vocab": vocab | {_NOTHING: size}, "unk_token": _NOTHING}


def assemble(document: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """A tokenizer from the contents of a ``tokenizer.json``; a BPE model as objects, not JSON."""
    model = document["model"]
    bpe = model.get("type") == "BPE"
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    base: dict[str, Any] = {"version": "1.0", "added_tokens": [], "post_processor": None}
    with _library_errors("is damaged"):
        text = json.dumps({**base, **document, "model": empty if bpe else model})
        tokenizer = tokenizers.Tokenizer.from_str(text)
        if bpe:
            tokenizer.model = _bpe(model)
    return tokenizer


@contextmanager
def _library_errors(what: str) -> Iterator[None]:
    """Turn whatever the library raises into a TokenizerError.

    A panic of its Rust code (a regex that backtracks without end) is not an Exception, and prints a
    line on stderr that Python cannot prevent.
    """
    try:
        yield
    except BaseException as reason:
        if isinstance(reason, Exception) or type(reason).__name__ == "PanicException":
            raise TokenizerError(f"the tokenizer {what}: {reason}") from None
        raise


def _bpe(model: Mapping[str, Any]) -> tokenizers.models.BPE:
    options = {name: model[name] for name in _BPE_OPTIONS if model.get(name) is not None}
    vocab, merges = model["vocab"], list(model["merges"])
    try:
        return tokenizers.models.BPE(vocab, merges, **options)
    except Exception:  # probably a merge without a token: rare, so not checked before
        return tokenizers.models.BPE(vocab, list(known_merges(list(vocab), merges)), **options)


_LONG_RUN: Final = 1200
_STEP: Final = 600  # a multiple of three


def _digit_cutter(digits: str) -> Callable[[str], Iterator[str]]:
    """Splits long runs of digits where the (quadratic) pattern splits anyway."""
    pattern = tokenizers.Regex(f"{digits}{{{_LONG_RUN},}}")
    between = tokenizers.pre_tokenizers.Split(pattern, "removed")

    def cut(text: str) -> Iterator[str]:
        if len(text) < _LONG_RUN:
            yield text
            return
        gaps = [offsets for _, offsets in between.pre_tokenize_str(text)]
        ends = [(0, 0), *gaps, (len(text), len(text))]
        start = 0
        for (_, run_start), (run_end, _) in pairwise(ends):
            for place in range(run_start + (run_end - run_start) % 3 + _STEP, run_end, _STEP):
                yield text[start:place]
                start = place
        yield text[start:]

    return cut


def _whole(text: str) -> Iterator[str]:
    yield text


_LITERAL: Final = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
_CONTROL: Final = (TokenType.CONTROL, TokenType.UNKNOWN)


def _gpt2_alphabet() -> dict[str, int]:
    """Character -> byte (Radford et al. 2019, ``encoder.py``): printable Latin-1 stands for itself,
    the other bytes in order for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_ALPHABET: Final = _gpt2_alphabet()
"""GPT-2's alphabet: character -> byte."""


class Pieces:
    """The tokens of a vocabulary.

    Args:
        byte_level: GPT-2's alphabet rather than sentencepiece's.
        escaped: whether U+2581 is a space.
    """

    def __init__(
        self, texts: Sequence[str], types: Sequence[TokenType], byte_level: bool, escaped: bool
    ) -> None:
        self._texts = texts
        self._types = types
        self._byte_level = byte_level
        self._escaped = escaped

    def __len__(self) -> int:
        return len(self._texts)

    def text(self, token_id: int) -> str:
        return self._texts[self._index(token_id)]

    def is_control(self, token_id: int) -> bool:
        return self._types[self._index(token_id)] in _CONTROL

    def spell(self, token_id: int) -> bytes:
        """The bytes a token adds to a text."""
        index = self._index(token_id)
        text, type_ = self._texts[index], self._types[index]
        if type_ == TokenType.BYTE:
            return bytes([int(text[3:5], 16)])
        if type_ in _LITERAL:
            return _raw(text)
        if self._byte_level:
            return b"".join(
                bytes([BYTE_ALPHABET[c]]) if c in BYTE_ALPHABET else _raw(c) for c in text
            )
        return _raw(text.replace("\u2581", " ") if self._escaped else text)

    def spell_visible(self, token_id: int) -> bytes:
        return b"" if self.is_control(token_id) else self.spell(token_id)

    def ids(self) -> dict[str, int]:
        """Text -> id."""
        return self._ids

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {text: index for index, text in enumerate(self._texts)}

    def _index(self, token_id: SupportsIndex) -> int:
        """The id as an int, also of numpy and MLX; raises TokenizerError."""
        try:
            index = operator.index(token_id)
        except TypeError:
            raise TokenizerError(f"{token_id!r} is no token id") from None
        if not 0 <= index < len(self._texts):
            raise TokenizerError(
                f"token {index} is outside the vocabulary of {len(self._texts)} tokens"
            )
        return index


def _raw(text: str) -> bytes:
    """UTF-8, with the invalid bytes of the vocabulary restored."""
    return text.encode("utf-8", "surrogateescape")
