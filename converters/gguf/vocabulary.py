"""The ``tokenizer.*`` keys of a GGUF, validated, with llama.cpp's defaults for absent ones."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from converters.gguf.endings import correct_types, end_ids
from converters.gguf.pretokenizers import PRE_TOKENIZERS, PreTokenizer

if TYPE_CHECKING:
    from converters.gguf.reader import GGUFFile

__all__ = ["BPE_MODELS", "KINDS", "TokenType", "Vocabulary", "read_vocabulary", "spelled"]


class TokenType(IntEnum):
    """The values of ``tokenizer.ggml.token_type``."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_TYPES: Final = {int(type_): type_ for type_ in TokenType}
KINDS: Final = {
    "llama": "spm",
    "gpt2": "bpe",
    "gemma4": "bpe",
    "t5": "unigram",
    "rwkv": "rwkv",
    "bert": "wordpiece",
}
"""Kind of each ``tokenizer.ggml.model``."""

BPE_MODELS: Final = tuple(model for model, kind in KINDS.items() if kind == "bpe")

# All splits of a token take the square of its length; real ones have a few hundred characters.
MAX_TOKEN: Final = 4096
_TEMPLATE_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_BYTES: Final = frozenset(f"<0x{value:02X}>" for value in range(256))
_SPECIALS: Final = ("bos", "eos", "eot", "eom", "unknown", "seperator", "padding", "mask")
_DEFAULT_IDS: Final[Mapping[str, Mapping[str, int]]] = {
    "spm": {"bos": 1, "eos": 2, "unknown": 0},
    "unigram": {"eos": 1, "unknown": 2, "padding": 0},
    "wordpiece": {"bos": 101, "unknown": 100, "seperator": 102, "padding": 0, "mask": 103},
}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A vocabulary and its rules.

    Attributes:
        kind: "spm", "bpe", "unigram", "wordpiece" or "rwkv".
        tokens: the text of each token as stored; bytes that are not UTF-8 are lone surrogates.
        types: the TokenType of each token after llama.cpp's corrections by text.
        scores: (V,) float32, zeros where the file has none.
        merges: pairs in order of rank.
        pre: the pre-tokenizer; for BPE only.
        ids: special tokens by role: "bos", "eos", "eot", "eom", "unknown", "padding" ...
        end_ids: end-of-generation tokens.
        lstrip, rstrip: special tokens that strip white space before or after them.
        charsmap: sentencepiece's precompiled normalizer; empty for none.
        templates: chat templates by name; the file's main one is "default".
    """

    kind: str
    tokens: list[str]
    types: list[TokenType]
    scores: npt.NDArray[np.float32]
    merges: list[tuple[str, str]]
    pre: PreTokenizer | None
    ids: Mapping[str, int]
    end_ids: frozenset[int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    remove_extra_whitespaces: bool
    lstrip: frozenset[int]
    rstrip: frozenset[int]
    charsmap: bytes
    templates: Mapping[str, str]

    def token(self, role: str) -> str | None:
        index = self.ids.get(role)
        return None if index is None else self.tokens[index]


def spelled(tokens: Sequence[str]) -> Sequence[str]:
    """The tokens, with unique placeholders for those that are not UTF-8."""
    try:
        "".join(tokens).encode()
    except UnicodeEncodeError:
        lone = re.compile("[\ud800-\udfff]")
        return [f"\ufffd<{i}>" if lone.search(token) else token for i, token in enumerate(tokens)]
    return tokens


def read_vocabulary(gguf: GGUFFile) -> Vocabulary:
    """The vocabulary of a GGUF; GGUFError for contradictions or an unknown (pre-)tokenizer."""
    kind = _kind(gguf)
    tokens = _tokens(gguf)
    pre = _pre_tokenizer(gguf) if kind == "bpe" else None
    ids = _special_ids(gguf, kind, len(tokens))
    by_text = {token: index for index, token in enumerate(tokens)}
    types = correct_types(by_text, ids, _types(gguf, tokens))
    lstrip, rstrip = _strips(gguf, tokens, types)
    return Vocabulary(
        kind=kind,
        tokens=tokens,
        types=[_TYPES[value] for value in types],
        scores=_scores(gguf, len(tokens)),
        merges=_merges(gguf) if kind == "bpe" else [],
        pre=pre,
        ids=ids,
        end_ids=end_ids(by_text, ids),
        add_bos=_add_bos(gguf, kind, pre),
        add_eos=_flag(gguf, "add_eos_token", kind in ("unigram", "wordpiece")),
        add_space_prefix=_flag(gguf, "add_space_prefix", kind == "spm"),
        remove_extra_whitespaces=_flag(gguf, "remove_extra_whitespaces", False),
        lstrip=lstrip,
        rstrip=rstrip,
        charsmap=_charsmap(gguf),
        templates=_templates(gguf),
    )


def _kind(gguf: GGUFFile) -> str:
    model = gguf.get("tokenizer.ggml.model")
    if not isinstance(model, str) or model not in KINDS:
        known = ", ".join(KINDS)
        raise gguf.error("tokenizer.ggml.model", expected=f"a kind of tokenizer: {known}")
    return KINDS[model]


def _pre_tokenizer(gguf: GGUFFile) -> PreTokenizer:
    """The entry that the file names; ``default`` where it names none, as old files do."""
    key = "tokenizer.ggml.pre"
    name = "gemma4" if gguf.get("tokenizer.ggml.model") == "gemma4" else gguf.get(key) or "default"
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise gguf.error(
            key,
            expected="a known pre-tokenizer",
            hint="Without its rules text would be tokenized wrongly: a newer release may know it.",
        )
    return PRE_TOKENIZERS[name]


def _tokens(gguf: GGUFFile) -> list[str]:
    key = "tokenizer.ggml.tokens"
    tokens = _list(gguf, key, str)
    if not tokens:
        raise gguf.error(key, expected="at least one token")
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]
    longest = max(range(len(tokens)), key=lambda index: len(tokens[index]))
    if len(tokens[longest]) > MAX_TOKEN:
        found = f"{len(tokens[longest])} at {longest}"
        raise gguf.error(key, expected=f"tokens of at most {MAX_TOKEN} characters", found=found)
    if len(set(tokens)) != len(tokens):
        twin = next(token for token, count in Counter(tokens).items() if count > 1)
        where = [index for index, token in enumerate(tokens) if token == twin]
        found = f"{twin!r} at {where[0]} and {where[1]}"
        raise gguf.error(key, expected="tokens that differ", found=found)
    return tokens


def _types(gguf: GGUFFile, tokens: Sequence[str]) -> list[int]:
    """Token types; without the key, byte tokens are known by their text."""
    key = "tokenizer.ggml.token_type"
    if key not in gguf.metadata:
        return [TokenType.BYTE if t in _BYTES else TokenType.NORMAL for t in tokens]
    types = _numbers(gguf, key, len(tokens), "iu").tolist()
    return [_type(token, type_) for token, type_ in zip(tokens, types, strict=True)]


def _type(token: str, type_: int) -> int:
    if type_ == TokenType.BYTE:
        return TokenType.BYTE if token in _BYTES else TokenType.NORMAL
    return type_ if 0 <= type_ < TokenType.BYTE else TokenType.UNDEFINED


def _scores(gguf: GGUFFile, size: int) -> npt.NDArray[np.float32]:
    key = "tokenizer.ggml.scores"
    if key not in gguf.metadata:
        return np.zeros(size, np.float32)
    scores = _numbers(gguf, key, size, "iuf").astype(np.float32)
    if not np.isfinite(scores).all():
        raise gguf.error(key, expected="finite numbers")
    return scores


def _merges(gguf: GGUFFile) -> list[tuple[str, str]]:
    """Merges as pairs. The first character may be a space, the separator comes later."""
    key = "tokenizer.ggml.merges"
    merges = []
    for index, merge in enumerate(_list(gguf, key, str)):
        gap = merge.find(" ", 1)
        if gap < 0 or gap + 1 == len(merge):
            raise gguf.error(
                key, expected="pairs parted by a space", found=f"{merge!r} at index {index}"
            )
        merges.append((merge[:gap], merge[gap + 1 :]))
    return merges


def _special_ids(gguf: GGUFFile, kind: str, size: int) -> dict[str, int]:
    ids: dict[str, int] = {}
    for role in _SPECIALS:
        key = f"tokenizer.ggml.{role}_token_id"
        value = gguf.get(key, _DEFAULT_IDS.get(kind, {}).get(role))
        if value is None or (key not in gguf.metadata and value >= size):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < size:
            raise gguf.error(key, expected=f"a token id below {size}")
        ids[role] = value
    for role in ("fim_pad", "fim_rep", "fim_sep"):
        value = gguf.get(f"tokenizer.ggml.{role}_token_id")
        if isinstance(value, int) and 0 <= value < size:
            ids[role] = value
    return ids


def _add_bos(gguf: GGUFFile, kind: str, pre: PreTokenizer | None) -> bool:
    default = pre.add_bos if pre else kind in ("spm", "wordpiece")
    return _flag(gguf, "add_bos_token", default) or (pre is not None and pre.forces_bos)


def _strips(
    gguf: GGUFFile, tokens: Sequence[str], types: Sequence[int]
) -> tuple[frozenset[int], frozenset[int]]:
    """Special tokens that strip white space, by llama.cpp's rules: GGUF has no key for it."""
    name = str(gguf.get("general.name", "")).lower()
    pre = str(gguf.get("tokenizer.ggml.pre", ""))
    arch = str(gguf.get("general.architecture", ""))
    masks: tuple[str, ...] = ()
    if pre.startswith(("jina-v2-de", "jina-v2-es", "jina-v2-code")) or arch in (
        "nomic-bert-moe",
        "jina-bert-v3",
    ):
        masks = ("<mask>",)
    elif "phi-3" in name or "phi3" in name:
        special = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
        kept = ("<unk>", "<s>", "<|endoftext|>")
        swallow = frozenset(
            index
            for index, (token, type_) in enumerate(zip(tokens, types, strict=True))
            if (type_ in special or token == "</s>") and token not in kept
        )
        return frozenset(), swallow
    elif "modern-bert" in name:
        masks = ("[MASK]",)
    return frozenset(index for index, token in enumerate(tokens) if token in masks), frozenset()


def _charsmap(gguf: GGUFFile) -> bytes:
    value = gguf.get("tokenizer.ggml.precompiled_charsmap")
    return value.astype(np.uint8).tobytes() if isinstance(value, np.ndarray) else b""


def _templates(gguf: GGUFFile) -> dict[str, str]:
    prefix = "tokenizer.chat_template"
    templates = {}
    for key, value in gguf.metadata.items():
        if key == prefix or key.startswith(f"{prefix}."):
            if not isinstance(value, str):
                raise gguf.error(key, expected="a Jinja template as a string")
            name = "default" if key == prefix else key.removeprefix(f"{prefix}.")
            if not _TEMPLATE_NAME.fullmatch(name):  # it becomes the name of a file
                raise gguf.error(key, expected="a name of letters, digits, - and _", found=name)
            templates[name] = value.encode("utf-8", "replace").decode()
    return templates


def _flag(gguf: GGUFFile, name: str, default: bool) -> bool:
    key = f"tokenizer.ggml.{name}"
    value = gguf.get(key, default)
    if not isinstance(value, bool):
        raise gguf.error(key, expected="true or false")
    return value


def _list(gguf: GGUFFile, key: str, item: type) -> list[Any]:
    value = gguf.get(key)
    if not isinstance(value, list) or not all(isinstance(entry, item) for entry in value):
        raise gguf.error(key, expected="a list of strings")
    return value


def _numbers(gguf: GGUFFile, key: str, size: int, kinds: str) -> npt.NDArray[Any]:
    value = gguf.get(key)
    if not isinstance(value, np.ndarray) or value.ndim != 1 or value.dtype.kind not in kinds:
        raise gguf.error(key, expected="a list of numbers")
    if len(value) < size:
        raise gguf.error(key, expected=f"{size} entries, one a token", found=str(len(value)))
    return value[:size]
