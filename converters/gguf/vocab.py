"""The ``tokenizer.*`` keys of a GGUF, validated, with llama.cpp's defaults for absent ones.

Pre-tokenizers and the rules for end-of-generation tokens are llama.cpp's (``llama-vocab.cpp``,
``unicode.cpp``; November 2026).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from converters.gguf.file import GGUFFile
from converters.gguf.validate import MERGES, SCORES, TOKEN_TYPE, TOKENS


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

# All splits of a token take the square of its length; real ones have a few hundred characters.
MAX_TOKEN: Final = 4096
_TEMPLATE_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_BYTES: Final = frozenset(f"<0x{value:02X}>" for value in range(256))
_SPECIALS: Final = (
    *("bos", "eos", "eot", "eom", "unknown", "seperator", "padding", "mask"),
    *("fim_pad", "fim_rep", "fim_sep"),
)
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


def utf8_tokens(tokens: Sequence[str]) -> Sequence[str]:
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
    types = _correct_types(by_text, ids, _types(gguf, tokens))
    lstrip, rstrip = _strips(gguf, tokens, types)
    add_bos = pre.add_bos if pre else kind in ("spm", "wordpiece")
    charsmap = gguf.get("tokenizer.ggml.precompiled_charsmap")

    def flag(name: str, default: bool) -> bool:
        return bool(gguf.get(f"tokenizer.ggml.{name}", default))

    return Vocabulary(
        kind=kind,
        tokens=tokens,
        types=[_TYPES[value] for value in types],
        scores=_scores(gguf, len(tokens)),
        merges=_merges(gguf) if kind == "bpe" else [],
        pre=pre,
        ids=ids,
        end_ids=end_ids(by_text, ids),
        add_bos=flag("add_bos_token", add_bos) or (pre is not None and pre.forces_bos),
        add_eos=flag("add_eos_token", kind in ("unigram", "wordpiece")),
        add_space_prefix=flag("add_space_prefix", kind == "spm"),
        remove_extra_whitespaces=flag("remove_extra_whitespaces", False),
        lstrip=lstrip,
        rstrip=rstrip,
        charsmap=charsmap.astype(np.uint8).tobytes() if isinstance(charsmap, np.ndarray) else b"",
        templates=_templates(gguf),
    )


def _kind(gguf: GGUFFile) -> str:
    model = gguf.get("tokenizer.ggml.model")
    if model not in KINDS:
        known = ", ".join(KINDS)
        raise gguf.error("tokenizer.ggml.model", expected=f"a kind of tokenizer: {known}")
    return KINDS[model]


def _pre_tokenizer(gguf: GGUFFile) -> PreTokenizer:
    """The entry that the file names; ``default`` where it names none, as old files do."""
    key = "tokenizer.ggml.pre"
    name = "gemma4" if gguf.get("tokenizer.ggml.model") == "gemma4" else gguf.get(key) or "default"
    if name not in PRE_TOKENIZERS:
        raise gguf.error(
            key,
            expected="a known pre-tokenizer",
            hint="Without its rules text would be tokenized wrongly: a newer release may know it.",
        )
    return PRE_TOKENIZERS[name]


def _tokens(gguf: GGUFFile) -> list[str]:
    tokens = gguf.get(TOKENS)
    if tokens is None:
        raise gguf.error(TOKENS, expected="a list of strings")
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]
    longest = max(range(len(tokens)), key=lambda index: len(tokens[index]))
    if len(tokens[longest]) > MAX_TOKEN:
        found = f"{len(tokens[longest])} at {longest}"
        raise gguf.error(TOKENS, expected=f"tokens of at most {MAX_TOKEN} characters", found=found)
    if len(set(tokens)) != len(tokens):
        twin = next(token for token, count in Counter(tokens).items() if count > 1)
        where = [index for index, token in enumerate(tokens) if token == twin]
        found = f"{twin!r} at {where[0]} and {where[1]}"
        raise gguf.error(TOKENS, expected="tokens that differ", found=found)
    return tokens


def _types(gguf: GGUFFile, tokens: Sequence[str]) -> list[int]:
    """Token types; without the key, byte tokens are known by their text."""
    stored = gguf.get(TOKEN_TYPE)
    if stored is None:
        return [TokenType.BYTE if t in _BYTES else TokenType.NORMAL for t in tokens]
    return [_type(token, type_) for token, type_ in zip(tokens, stored.tolist(), strict=True)]


def _type(token: str, type_: int) -> int:
    if type_ == TokenType.BYTE:
        return TokenType.BYTE if token in _BYTES else TokenType.NORMAL
    return type_ if 0 <= type_ < TokenType.BYTE else TokenType.UNDEFINED


def _scores(gguf: GGUFFile, size: int) -> npt.NDArray[np.float32]:
    scores: npt.NDArray[np.float32] = gguf.get(SCORES, np.zeros(size)).astype(np.float32)
    if not np.isfinite(scores).all():
        raise gguf.error(SCORES, expected="finite numbers")
    return scores


def _merges(gguf: GGUFFile) -> list[tuple[str, str]]:
    """Merges as pairs. The first character may be a space, the separator comes later."""
    if MERGES not in gguf.metadata:
        raise gguf.error(MERGES, expected="a list of strings")
    merges = []
    for index, merge in enumerate(gguf.get(MERGES)):
        gap = merge.find(" ", 1)
        if gap < 0 or gap + 1 == len(merge):
            found = f"{merge!r} at index {index}"
            raise gguf.error(MERGES, expected="pairs parted by a space", found=found)
        merges.append((merge[:gap], merge[gap + 1 :]))
    return merges


def _special_ids(gguf: GGUFFile, kind: str, size: int) -> dict[str, int]:
    stored = {role: gguf.get(f"tokenizer.ggml.{role}_token_id") for role in _SPECIALS}
    defaults = {role: i for role, i in _DEFAULT_IDS.get(kind, {}).items() if i < size}
    return defaults | {role: i for role, i in stored.items() if i is not None}


def _strips(
    gguf: GGUFFile, tokens: Sequence[str], types: Sequence[int]
) -> tuple[frozenset[int], frozenset[int]]:
    """Special tokens that strip white space, by llama.cpp's rules: GGUF has no key for it."""
    name = str(gguf.get("general.name", "")).lower()
    pre = str(gguf.get("tokenizer.ggml.pre", ""))
    masks: tuple[str, ...] = ()
    if pre.startswith(("jina-v2-de", "jina-v2-es", "jina-v2-code")) or gguf.architecture in (
        "nomic-bert-moe",
        "jina-bert-v3",
    ):
        masks = ("<mask>",)
    elif "phi-3" in name or "phi3" in name:
        special = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
        others = ("<unk>", "<s>", "<|endoftext|>")
        right = frozenset(
            index
            for index, (token, type_) in enumerate(zip(tokens, types, strict=True))
            if (type_ in special or token == "</s>") and token not in others
        )
        return frozenset(), right
    elif "modern-bert" in name:
        masks = ("[MASK]",)
    return frozenset(index for index, token in enumerate(tokens) if token in masks), frozenset()


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


# --- ends of generation ---------------------------------------------------------------------------

_ENDS: Final = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
)
# Separators of files in code models. Of each group only the first one present counts.
_FILE_ENDS: Final = {
    "fim_pad": ["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"],
    "fim_rep": ["<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"],
    "fim_sep": ["<|file_sep|>"],
}
# Fill-in-the-middle tokens: control tokens in any file, which end nothing.
_INFIX: Final = [
    line.split()
    for line in (
        "<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|>"
        " <|prefix|>",
        "<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|>"
        " <|suffix|>",
        "<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|>"
        " <|middle|>",
    )
]
_CHANNELS: Final = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


def end_ids(ids: Mapping[str, int], roles: Mapping[str, int]) -> frozenset[int]:
    """All end-of-generation tokens.

    Args:
        ids: the vocabulary, text -> id.
        roles: special tokens that the metadata names, by role ("eos", "eot", "eom", "fim_pad" ...).
    """
    ends = {ids[text] for text in _ENDS if text in ids}
    ends |= {roles[role] for role in ("eos", "eot", "eom") if role in roles}
    for role, texts in _FILE_ENDS.items():
        ends.update([roles[role]] if role in roles else _first(ids, texts))
    return frozenset(ends - {ids[text] for text in _not_ends(ids, roles)})


def _correct_types(
    ids: Mapping[str, int], roles: Mapping[str, int], types: Sequence[int]
) -> list[int]:
    """Token types, corrected by the tokens' texts; arguments as ``end_ids``."""
    fixed = list(types)
    for text in _ENDS:
        if text in ids:
            fixed[ids[text]] = TokenType.CONTROL
    for texts in (*_FILE_ENDS.values(), *_INFIX):
        for index in _first(ids, texts):
            fixed[index] = TokenType.CONTROL
    for text in _CHANNELS:
        if text in ids:
            fixed[ids[text]] = TokenType.USER_DEFINED
    for text, type_ in _not_ends(ids, roles).items():
        fixed[ids[text]] = type_
    return fixed


def _first(ids: Mapping[str, int], texts: Sequence[str]) -> list[int]:
    return [ids[text] for text in texts if text in ids][:1]


def _not_ends(ids: Mapping[str, int], roles: Mapping[str, int]) -> dict[str, int]:
    """Texts of ``_ENDS`` that end nothing in this vocabulary, with their type here."""
    others: dict[str, int] = {}
    calls = "<|call|>" in ids or "<|calls|>" in ids
    if "<|end|>" in ids and calls and ("<|return|>" in ids or "<|flush|>" in ids):
        others["<|end|>"] = TokenType.USER_DEFINED  # separates the messages of one turn
    plamo = ids.get("<|plamo:eos|>") in [roles.get(role, -1) for role in ("eos", "eot", "eom")]
    if "</s>" in ids and ("<|tool_response>" in ids or plamo):
        others["</s>"] = TokenType.NORMAL
    return others


# --- pre-tokenizers -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How text is split into words before BPE merges tokens.

    Attributes:
        patterns: Oniguruma patterns (as the ``tokenizers`` library takes), each applied to the
            words that the one before left; matches and gaps become words. Some fold all cases of
            letters into one class (``youtu``, ``tiny_aya``, ``tekken``, ``gpt-4o``), as llama.cpp
            does: files are made and tested with it.
        ignore_merges: a word that is a token as a whole is not merged from its characters.
        add_bos: text starts with BOS where the file does not say.
        forces_bos: text starts with BOS even if the file denies it, as many files wrongly do.
        byte_level: words are in GPT-2's byte alphabet; otherwise in plain UTF-8 with ``<0xXX>``
            tokens for bytes that the vocabulary lacks.
        escape_spaces: spaces become U+2581.
        digits_from_right: the class of digits that are grouped in threes from the right, if any; a
            long run of them may be cut a multiple of three from its end without changing a word.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    forces_bos: bool = False
    byte_level: bool = True
    escape_spaces: bool = False
    digits_from_right: str | None = None


# Building blocks. English contractions, in lower case only and in any case.
_LOWER = r"'s|'t|'re|'ve|'m|'ll|'d"
_ANY_CASE = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_SPACES = r"\s+(?!\S)|\s+"
_LINES = r"\s*[\r\n]+"
_LEAD = r"[^\r\n\p{L}\p{N}]?"  # one leading space or sign joins the word
_SIGNS = r" ?[^\s\p{L}\p{N}]+"
_NOT_LOWER, _NOT_UPPER = r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]"
_HAN = (
    "\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f"
    "\U0002b820-\U0002ceaf\U0002ceb0-\U0002ebef\uf900-\ufaff\U0002f800-\U0002fa1f"
)
_ASCII_SIGN_WORD = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
# Each match ends at a place from which the digits left are a multiple of three; the text before
# the first group belongs to it, as in llama.cpp, and later patterns cut it off.
_THREES = r"[^\p{N}]*+(?:\p{N}{1,3}(?=(?:\p{N}{3})*+(?!\p{N}))|\z)"


def _words(digits: str, *, lead: str = _LEAD, signs: str = _SIGNS + r"[\r\n]*") -> str:
    """The pattern of GPT-4's family, which differs from model to model in a few places."""
    return rf"(?:{_ANY_CASE})|{lead}\p{{L}}+|{digits}|{signs}|{_LINES}|{_SPACES}"


def _cased(first: str, last: str, tail: str, digits: str) -> str:
    """The pattern of GPT-4o's family: a word is capitals, then small letters."""
    return (
        rf"{_LEAD}{first}*{last}+{tail}|{_LEAD}{first}+{last}*{tail}"
        rf"|{digits}|{_SIGNS}[\r\n/]*|{_LINES}|{_SPACES}"
    )


_GPT2 = rf"{_LOWER}| ?\p{{L}}+| ?\p{{N}}+|{_SIGNS}|{_SPACES}"
_LLAMA3 = _words(r"\p{N}{1,3}")
_QWEN2 = _words(r"\p{N}")
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_PUNCTUATED = (
    rf"{_ASCII_SIGN_WORD}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_LINES}|{_SPACES}"
)
_THREE_DIGITS = r"\p{N}{1,3}"
_CJK_DEEPSEEK3 = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
# U+2000 to U+200A, U+2028, U+2029, U+202F, U+205F and U+3000 lie in the range but are spaces.
_CJK_DEEPSEEK = "[[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]&&[^\\s]]+"
_LETTERS_DEEPSEEK = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5"
    "\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3"
    "\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115"
    "\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149"
    "\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06"
    "\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
)
_CJK_AFMOE = (
    "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f"
    "\u2f00-\u2fdf\u0e40-\u0e7f\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f"
    "\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
_KIMI = (
    rf"[{_HAN}]+|{_LEAD}[\p{{L}}&&[^{_HAN}]]+(?:{_ANY_CASE})?"
    rf"|{_THREE_DIGITS}|{_SIGNS}[\r\n]*|{_LINES}|{_SPACES}"
)
_HALVING = "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4))

PRE_TOKENIZERS: Final[dict[str, PreTokenizer]] = {}
"""Every value of ``tokenizer.ggml.pre`` that llama.cpp knows."""


def _add(names: str, *patterns: str, **rules: Any) -> None:
    PRE_TOKENIZERS.update(dict.fromkeys(names.split(), PreTokenizer(patterns, **rules)))


_add("default", r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
_add(
    "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert"
    " jina-v1-en jina-v2-code roberta-bpe mpt olmo jais trillion granite-docling exaone4",
    _GPT2,
)
_add(
    "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2",
    r"\p{N}",
    _GPT2,
)
_add(
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
    _LLAMA3,
    ignore_merges=True,
    add_bos=True,
)
_add("dbrx smaug-bpe chatglm-bpe", _LLAMA3)
_add("glm4 glm5", _LLAMA3, ignore_merges=True)
_add("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2", _QWEN2)
_add(
    "qwen35",
    rf"(?:{_ANY_CASE})|{_LEAD}[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_LINES}|{_SPACES}",
)
_add("ufakzeka", rf"{_LEAD}\p{{L}}+|\p{{N}}|{_SIGNS}[\r\n]*|{_LINES}|{_SPACES}")
_add("seed-coder", _words(r"\p{N}", signs=r" ?[^\s\p{L}\p{N}\r\n]+"))
_add("minicpm5", _THREE_DIGITS, _words(r"\p{N}+"), ignore_merges=True)
_add("laguna", r"[^\n]+|\n+", _QWEN2)
_add(
    "jais-2",
    rf"(?:{_ANY_CASE})|{_LEAD}\p{{L}}+|\p{{N}}{{1,3}}|{_SIGNS}[\r\n]*|{_LINES}"
    rf"|{_HALVING}|\s{{1,2}}(?!\S)|\s",
)
_add(
    "exaone-moe",
    rf"(?:{_ANY_CASE})|{_LEAD}(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    rf"|{_SIGNS}[\r\n/]?|\s*[\r\n]|{_SPACES}",
)
_add(
    "bailingmoe bailingmoe2 llada-moe",
    rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|{_LEAD}\p{{L}}+|\p{{N}}|{_SIGNS}[\r\n]*"
    rf"|\s*[\r\n]|{_SPACES}",
)
_add(
    "gpt-4o llama4 kanana2 talkie minimax-m2",
    _cased(_NOT_LOWER, _NOT_UPPER, rf"(?:{_ANY_CASE})?", _THREE_DIGITS),
)
_add("tekken", _cased(_NOT_LOWER, _NOT_UPPER, "", r"\p{N}"), ignore_merges=True, add_bos=True)
_add(
    "granite-embed-multi-97m",
    _cased(
        r"[[\p{L}\p{M}]&&[^a-z]]",
        r"[[\p{L}\p{M}]&&[^A-Z]]",
        rf"(?:{_ANY_CASE})?",
        _THREE_DIGITS,
    ),
    ignore_merges=True,
)
_add(
    "tiny_aya cohere2moe",
    _THREES,
    _cased(r"[\p{L}\p{M}]", r"[\p{L}\p{M}]", rf"(?:{_ANY_CASE})?", _THREE_DIGITS),
    digits_from_right=r"\p{N}",
)
_add(
    "youtu",
    "[\uac00-\ud7a3\u3131-\u318e]+"
    "|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    "|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    _cased(r"[\p{L}\p{M}]", r"[\p{L}\p{M}]", rf"(?:{_ANY_CASE})?", r"\p{N}"),
    ignore_merges=True,
)
_add("deepseek-v3 hunyuan-dense joyai-llm hy_v4", _THREE_DIGITS, _CJK_DEEPSEEK3, _PUNCTUATED)
_add(
    "spark2_5",
    _THREE_DIGITS,
    _CJK_DEEPSEEK3,
    rf"{_ASCII_SIGN_WORD}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    rf"| ?[\p{{P}}\p{{S}}]+|[\r\n]|{_SPACES}",
    r"\p{N}",
)
_add(
    "deepseek-llm",
    r"[\r\n]",
    rf"\s?[{_LETTERS_DEEPSEEK}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3001\u3002]+",
    r"\s+$",
    _CJK_DEEPSEEK,
    r"\p{N}+",
)
_add("deepseek-coder", r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_DEEPSEEK, r"\p{N}")
_add("falcon", r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")
_add("poro-chat bloom gpt3-finnish", _BLOOM)
_add("viking", _BLOOM, r"\p{N}")
_add("superbpe", r"\p{N}+", r"(?=([0-9]{3})++(?![0-9]))", digits_from_right="[0-9]")
_add("afmoe", _THREES, _CJK_AFMOE, _PUNCTUATED, digits_from_right=r"\p{N}")
_add("kimi-k2", _KIMI)
_add(
    "chameleon",
    r"<sentinel:[0-9]+>",
    r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
    r"([\t\n]|    |  )",
    r"\p{N}",
    r"[\p{P}!-/:-@\[-`{-~]",
    _GPT2,
    add_bos=True,
)
# Runs of line feeds are tokens that no merges make; llama.cpp looks only them up as a whole.
_add(
    "gemma4 granite-embed-multi-311m",
    r"[^\n]+|\n+",
    byte_level=False,
    escape_spaces=True,
    ignore_merges=True,
    add_bos=True,
    forces_bos=True,
)
_add("sarvam-moe", r"[^\n]+|\n+", byte_level=False, escape_spaces=True)
_add("whitespace", r"\S+", byte_level=False)
