"""Tokens of a vocabulary as bytes, and encoders of plain text, one per kind of vocabulary."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from typing import Any, Final, Protocol, SupportsIndex

import tokenizers

from converters.gguf.vocab import PreTokenizer, TokenType, Vocabulary, utf8_tokens
from converters.huggingface.tokenizer_files import bpe_pipeline, known_merges, model_proto
from mlxrun.errors import TokenizerError

__all__ = ["Encoder", "LibraryEncoder", "Tokens", "bpe_with_unknown_ids", "encoder_of"]

_UNKNOWN: Final = "\ufffd<nothing>"
_BPE_OPTIONS: Final = (
    *("unk_token", "fuse_unk", "byte_fallback", "ignore_merges"),
    *("continuing_subword_prefix", "end_of_word_suffix"),
)
_CONTROL: Final = (TokenType.CONTROL, TokenType.UNKNOWN)
_LITERAL: Final = (*_CONTROL, TokenType.USER_DEFINED)

# Characters of a run of digits that is split, and of its parts: a multiple of three.
_LONG_RUN, _DIGITS = 1200, 600


def _gpt2_alphabet() -> dict[str, int]:
    """Character -> byte (Radford et al. 2019, ``encoder.py``): printable Latin-1 stands for itself,
    the other bytes in order for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_ALPHABET: Final = _gpt2_alphabet()


class Tokens:
    """The tokens of a vocabulary: texts, types and bytes.

    Args:
        byte_level: bytes are written in GPT-2's alphabet rather than sentencepiece's, where U+2581
            is a space and ``<0xXX>`` a byte.
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

    def to_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds to a text."""
        index = self._index(token_id)
        text, type_ = self._texts[index], self._types[index]
        if type_ == TokenType.BYTE:
            return bytes([int(text[3:5], 16)])
        if type_ in _LITERAL:
            return _utf8(text)
        if self._byte_level:
            return b"".join(
                bytes([_BYTE_ALPHABET[c]]) if c in _BYTE_ALPHABET else _utf8(c) for c in text
            )
        return _utf8(text.replace("\u2581", " ") if self._escaped else text)

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """Text -> id."""
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


def _utf8(text: str) -> bytes:
    """UTF-8, with the invalid bytes of the vocabulary restored."""
    return text.encode("utf-8", "surrogateescape")


class Encoder(Protocol):
    def __call__(self, text: str, first: bool) -> list[int]:
        """Encode plain text, never to a control token; ``first`` if nothing precedes it."""
        ...


def encoder_of(vocabulary: Vocabulary) -> Encoder:
    if vocabulary.kind in ("spm", "unigram"):
        return _SPMEncoder(vocabulary)
    if vocabulary.pre is not None:
        return _bpe_encoder(vocabulary, vocabulary.pre)
    raise TokenizerError(f"vocabularies of kind {vocabulary.kind!r} are not supported yet")


class _SPMEncoder:
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


class LibraryEncoder:
    """The ``tokenizers`` library on a ``tokenizer.json``.

    Args:
        document: the file's contents.
        size: of the vocabulary; ids past it are dropped.
        rest: as ``document`` for text after the first part, if that differs.
        digits: pattern of a digit, where the (quadratic) pre-tokenizer splits runs of them in
            threes from the right.
    """

    def __init__(
        self,
        document: Mapping[str, Any],
        size: int,
        *,
        rest: Mapping[str, Any] | None = None,
        digits: str | None = None,
    ) -> None:
        self._first = _assemble(document)
        self._rest = self._first if rest is None else _assemble(rest)
        self._size = size
        self._long_runs = None
        if digits:
            pattern = tokenizers.Regex(f"{digits}{{{_LONG_RUN},}}")
            self._long_runs = tokenizers.pre_tokenizers.Split(pattern, "removed")

    def __call__(self, text: str, first: bool) -> list[int]:
        tokenizer = self._first if first else self._rest
        with _library_errors("fails on this text"):
            found = [tokenizer.encode(part, add_special_tokens=False) for part in self._split(text)]
        return [index for each in found for index in each.ids if index < self._size]

    def _split(self, text: str) -> Iterator[str]:
        """Split long runs of digits where the pre-tokenizer splits anyway."""
        start = 0
        if self._long_runs and len(text) >= _LONG_RUN:
            gaps = [offsets for _, offsets in self._long_runs.pre_tokenize_str(text)]
            ends = [(0, 0), *gaps, (len(text), len(text))]
            for (_, run_start), (run_end, _) in pairwise(ends):
                first = run_start + (run_end - run_start) % 3 + _DIGITS
                for place in range(first, run_end, _DIGITS):
                    yield text[start:place]
                    start = place
        yield text[start:]


def _bpe_encoder(vocabulary: Vocabulary, pre: PreTokenizer) -> LibraryEncoder:
    rows = zip(utf8_tokens(vocabulary.tokens), vocabulary.types, strict=True)
    model = {
        "type": "BPE",
        "vocab": {text: index for index, (text, type_) in enumerate(rows) if type_ not in _CONTROL},
        "merges": vocabulary.merges,
        "ignore_merges": pre.ignore_merges,
        "byte_fallback": not pre.byte_level,
    }
    size = len(vocabulary.tokens)
    model = bpe_with_unknown_ids(model, size, pre.byte_level)
    return LibraryEncoder({**bpe_pipeline(pre), "model": model}, size, digits=pre.digits_from_right)


def bpe_with_unknown_ids(model: Mapping[str, Any], size: int, byte_level: bool) -> dict[str, Any]:
    """A BPE model with ids past the end for bytes or characters without a token.

    llama.cpp drops those after merging, the ``tokenizers`` library before, which joins their
    neighbors. A model's own unknown token stays.
    """
    vocab = dict(model["vocab"])
    if byte_level:
        missing = [text for text in _BYTE_ALPHABET if text not in vocab]
        vocab |= {text: size + index for index, text in enumerate(missing)}
        return {**model, "vocab": vocab}
    if model.get("unk_token") is not None:
        return dict(model)
    return {**model, "vocab": vocab | {_UNKNOWN: size}, "unk_token": _UNKNOWN}


def _assemble(document: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The library's tokenizer for plain text; a BPE model is given as objects, not as JSON."""
    model = document["model"]
    bpe = model.get("type") == "BPE"
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    plain: dict[str, Any] = {
        "added_tokens": [],
        **dict.fromkeys(("post_processor", "truncation", "padding")),
    }
    with _library_errors("is damaged"):
        text = json.dumps({"version": "1.0", **document, **plain, "model": empty if bpe else model})
        tokenizer = tokenizers.Tokenizer.from_str(text)
        if bpe:
            tokenizer.model = _bpe(model)
    return tokenizer


def _bpe(model: Mapping[str, Any]) -> tokenizers.models.BPE:
    options = {name: model[name] for name in _BPE_OPTIONS if model.get(name) is not None}
    vocab, merges = model["vocab"], list(model["merges"])
    try:
        return tokenizers.models.BPE(vocab, merges, **options)
    except Exception:  # probably a merge without a token: rare, so not checked before
        return tokenizers.models.BPE(vocab, list(known_merges(list(vocab), merges)), **options)


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
