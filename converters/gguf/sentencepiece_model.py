"""SPM vocabularies as sentencepiece's ModelProto, and as the merges of a BPE tokenizer.

The messages are written by hand (wire format: https://protobuf.dev/programming-guides/encoding/;
field numbers: ``sentencepiece_model.proto``), without protobuf or generated code.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any, Final

from converters.gguf.vocabulary import Vocabulary, spelled

__all__ = ["merges_from_scores", "model_proto", "read_model"]

UNKNOWN_PIECE: Final = "\ufffd<unknown>"
"""Added to a vocabulary without an unknown token, as sentencepiece needs one."""

_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # piece types, the same numbers as GGUF's
_UNIGRAM, _BPE = 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_SHORT = [bytes([value]) for value in range(0x80)]

_SCORE = _SHORT[2 << 3 | _FIXED32]


def model_proto(vocabulary: Vocabulary) -> bytes:
    """A ModelProto that tokenizes as llama.cpp does with this vocabulary.

    The dummy prefix is left to the caller. All tokens but control, unknown and byte tokens are
    results of merges, whether user-defined, unused or normal.
    """
    types = _piece_types(vocabulary)
    texts = [text.encode() for text in spelled(vocabulary.tokens)]
    pieces = list(zip(texts, vocabulary.scores.tolist(), types, strict=True))
    if _UNKNOWN not in types:
        pieces.append((UNKNOWN_PIECE.encode(), 0.0, _UNKNOWN))
    parts = [_bytes(1, _piece(*piece)) for piece in pieces]
    unigram = vocabulary.kind == "unigram"
    trainer = _varint(3, _UNIGRAM if unigram else _BPE)
    # sentencepiece refuses a model with byte fallback that lacks one of the 256
    trainer += _varint(35, types.count(_BYTE) == 256)
    normalizer = _bytes(2, vocabulary.charsmap)
    normalizer += _varint(3, unigram and vocabulary.add_space_prefix)
    normalizer += _varint(4, unigram and vocabulary.remove_extra_whitespaces) + _varint(5, 1)
    return b"".join(parts) + _bytes(2, trainer) + _bytes(3, normalizer)


def _piece_types(vocabulary: Vocabulary) -> list[int]:
    """sentencepiece's type of each token; exactly one may be unknown."""
    types = [t if t in (_UNKNOWN, _CONTROL, _BYTE) else _NORMAL for t in vocabulary.types]
    unknowns = [index for index, type_ in enumerate(types) if type_ == _UNKNOWN]
    for index in unknowns[1:]:
        types[index] = _CONTROL
    return types


def _piece(text: bytes, score: float, type_: int) -> bytes:
    return _bytes(1, text) + _SCORE + struct.pack("<f", score) + _varint(3, type_)


def _varint(field: int, value: int) -> bytes:
    return _number(field << 3 | _VARINT) + _number(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _number(field << 3 | _BYTES) + _number(len(value)) + value


def _number(value: int) -> bytes:
    if value <= 0x7F:  # nearly all: a vocabulary has a hundred thousand
        return _SHORT[value]
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def merges_from_scores(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges, best first, with which a BPE tokenizer equals sentencepiece.

    sentencepiece joins the neighbors whose union has the highest score, the leftmost of equals;
    every split of a token into two is therefore a merge of that token's rank. ``tokens`` must be
    without control, unknown and byte tokens.
    """
    known = set(tokens)
    ranked = sorted(zip(scores, tokens, strict=True), key=lambda piece: -piece[0])
    return [
        (left, right)
        for _, token in ranked
        for i in range(1, len(token))
        if (left := token[:i]) in known and (right := token[i:]) in known
    ]


def read_model(proto: bytes) -> dict[str, Any]:
    """The ``tokens``, ``scores``, ``types``, ``unigram``, ``charsmap``, ``add_space_prefix`` and
    ``remove_extra_whitespaces`` of a ``tokenizer.model``.

    Raises:
        ValueError: the bytes are no ModelProto.
    """
    pieces, trainer, normalizer = [], {}, {}
    for field, value in _fields(proto):
        if field == 1:
            pieces.append(dict(_fields(value)))
        elif field == 2:
            trainer = dict(_fields(value))
        elif field == 3:
            normalizer = dict(_fields(value))
    own = [piece for piece in pieces if piece.get(1) != UNKNOWN_PIECE.encode()]
    return {
        "tokens": [piece.get(1, b"").decode() for piece in own],
        "scores": [struct.unpack("<f", piece.get(2, bytes(4)))[0] for piece in own],
        "types": [piece.get(3, _NORMAL) for piece in own],
        "unigram": trainer.get(3, _UNIGRAM) == _UNIGRAM,
        "charsmap": normalizer.get(2, b""),
        "add_space_prefix": bool(normalizer.get(3, 1)),
        "remove_extra_whitespaces": bool(normalizer.get(4, 1)),
    }


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a message: ints for varints, bytes for the rest."""
    at = 0
    while at < len(message):
        key, at = _read_number(message, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _read_number(message, at)
            yield key >> 3, value
            continue
        if kind == _BYTES:
            size, at = _read_number(message, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > len(message):
            raise ValueError("a truncated field")
        yield key >> 3, message[at : at + size]
        at += size


def _read_number(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message) and shift < 70:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("a truncated number")
