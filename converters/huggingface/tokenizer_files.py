"""A GGUF's vocabulary as the tokenizer files of a Hugging Face checkpoint.

``tokenizer.json`` gives stock transformers (and so mlx-lm) the ids that the GGUF gives; for SPM
vocabularies its merges are derived from the scores, and ``tokenizer.model`` has the scores.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from typing import Any, Final

from converters.gguf.file import GGUFFile
from converters.gguf.sampling import sampling_config
from converters.gguf.vocab import PreTokenizer, TokenType, Vocabulary, read_vocabulary, utf8_tokens

_ADDED = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
_SPACE = "\u2581"
_ESCAPE_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
# From tokens in UTF-8 with <0xXX> for other bytes.
_DECODERS: list[dict[str, Any]] = [
    {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]


def tokenizer_files(gguf: GGUFFile) -> dict[str, bytes]:
    """Name (with at most one folder) to contents of a checkpoint's tokenizer files.

    GGUFError if the vocabulary is damaged, or of a kind without such files (e.g. "rwkv").
    """
    vocabulary = read_vocabulary(gguf)
    if vocabulary.kind not in ("bpe", "spm"):
        raise gguf.error(
            "tokenizer.ggml.model", expected="a BPE or SPM vocabulary, to be converted"
        )
    files = {
        "tokenizer.json": _dump(tokenizer_json(vocabulary), indent=None),
        "tokenizer_config.json": _dump(_tokenizer_config(vocabulary)),
        "special_tokens_map.json": _dump(_special_tokens(vocabulary)),
        "generation_config.json": _dump(
            _generation_config(vocabulary) | sampling_config(gguf.metadata)
        ),
    }
    if vocabulary.kind == "spm":
        files["tokenizer.model"] = model_proto(vocabulary)
    for name, template in vocabulary.templates.items():
        file = f"additional_chat_templates/{name}.jinja"
        files["chat_template.jinja" if name == "default" else file] = template.encode()
    return files


def tokenizer_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """The contents of ``tokenizer.json`` for a BPE or SPM vocabulary."""
    pipeline = bpe_pipeline(vocabulary.pre) if vocabulary.pre else _spm_pipeline(vocabulary)
    spm = vocabulary.kind == "spm"
    merges = _spm_merges(vocabulary) if spm else known_merges(vocabulary.tokens, vocabulary.merges)
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": vocabulary.token("unknown") if spm else None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": spm,
        "byte_fallback": vocabulary.pre is None or not vocabulary.pre.byte_level,
        "ignore_merges": vocabulary.pre is not None and vocabulary.pre.ignore_merges,
        "vocab": {token: index for index, token in enumerate(utf8_tokens(vocabulary.tokens))},
        "merges": merges,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(vocabulary),
        **pipeline,
        "post_processor": _post_processor(vocabulary),
        "model": model,
    }


def bpe_pipeline(pre: PreTokenizer) -> dict[str, Any]:
    """Normalizer, pre-tokenizer and decoder of a BPE model."""
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False}
        for p in pre.patterns
    ]
    if pre.byte_level:
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        steps.append({**level, "use_regex": False})
        decoder: dict[str, Any] = {**level, "use_regex": True}
    else:
        decoder = _sequence("decoders", *_DECODERS)
    return {
        "normalizer": _ESCAPE_SPACES if pre.escape_spaces else None,
        "pre_tokenizer": _sequence("pretokenizers", *steps),
        "decoder": decoder,
    }


def known_merges(
    tokens: Sequence[str], merges: Sequence[tuple[str, str]]
) -> Sequence[tuple[str, str]]:
    """The merges of known tokens, without duplicates."""
    known = set(tokens)
    unique = dict.fromkeys(
        m for m in merges if m[0] in known and m[1] in known and "".join(m) in known
    )
    return list(unique) if len(unique) != len(merges) else merges


def _spm_pipeline(vocabulary: Vocabulary) -> dict[str, Any]:
    prepend, strip = [], []
    if vocabulary.add_space_prefix:
        prepend = [{"type": "Prepend", "prepend": _SPACE}]
        strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return {
        "normalizer": _sequence("normalizers", *prepend, _ESCAPE_SPACES),
        "pre_tokenizer": None,
        "decoder": _sequence("decoders", *_DECODERS, *strip),
    }


def _spm_merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Merges of all tokens but control, unknown and byte tokens."""
    hidden = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.BYTE)
    rows = zip(vocabulary.tokens, vocabulary.scores.tolist(), vocabulary.types, strict=True)
    usable = [(token, score) for token, score, type_ in rows if type_ not in hidden]
    return merges_from_scores([token for token, _ in usable], [score for _, score in usable])


def _sequence(field: str, *steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", field: list(steps)}


def _added_tokens(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    return [
        {
            "id": index,
            "content": vocabulary.tokens[index],
            "single_word": False,
            "lstrip": index in vocabulary.lstrip,
            "rstrip": index in vocabulary.rstrip,
            "normalized": False,
            "special": type_ != TokenType.USER_DEFINED,
        }
        for index, type_ in enumerate(vocabulary.types)
        if type_ in _ADDED
    ]


def _post_processor(vocabulary: Vocabulary) -> dict[str, Any] | None:
    """The template that adds BOS and EOS."""
    roles = [role for role in ("bos", "eos") if _adds(vocabulary, role)]
    if not roles:
        return None
    names = {role: vocabulary.tokens[vocabulary.ids[role]] for role in roles}
    marks = {role: [{"SpecialToken": {"id": name, "type_id": 0}}] for role, name in names.items()}
    single = [*marks.get("bos", []), {"Sequence": {"id": "A", "type_id": 0}}, *marks.get("eos", [])]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            name: {"id": name, "ids": [vocabulary.ids[role]], "tokens": [name]}
            for role, name in names.items()
        },
    }


def _adds(vocabulary: Vocabulary, role: str) -> bool:
    added = vocabulary.add_bos if role == "bos" else vocabulary.add_eos
    return added and role in vocabulary.ids


def _special_tokens(vocabulary: Vocabulary) -> dict[str, str]:
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    texts = {f"{name}_token": vocabulary.token(role) for name, role in roles.items()}
    return {name: text for name, text in texts.items() if text is not None}


def _tokenizer_config(vocabulary: Vocabulary) -> dict[str, Any]:
    decoder = {str(entry.pop("id")): entry for entry in _added_tokens(vocabulary)}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": decoder,
        **_special_tokens(vocabulary),
        "add_bos_token": _adds(vocabulary, "bos"),
        "add_eos_token": _adds(vocabulary, "eos"),
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        # Read by mlxrun only: tokenizer.model has the scores, from which merges are derived.
        "gguf": {"kind": vocabulary.kind, "add_space_prefix": vocabulary.add_space_prefix},
    }


def _generation_config(vocabulary: Vocabulary) -> dict[str, Any]:
    roles = {"bos": "bos", "pad": "padding"}
    ids = {f"{n}_token_id": vocabulary.ids[r] for n, r in roles.items() if r in vocabulary.ids}
    return {**ids, "eos_token_id": sorted(vocabulary.end_ids)}


def _dump(value: Any, indent: int | None = 2) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=indent).encode("utf-8", "replace")


# --- tokenizer.model: sentencepiece's ModelProto --------------------------------------------------

# The messages are written by hand (wire format: https://protobuf.dev/programming-guides/encoding/;
# field numbers: sentencepiece_model.proto), without protobuf or generated code.
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
    texts = [text.encode() for text in utf8_tokens(vocabulary.tokens)]
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
    ``remove_extra_whitespaces`` of a ``tokenizer.model``; ValueError if it is no ModelProto.
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
