"""How BPE vocabularies cut text into words before merging: one entry per ``tokenizer.ggml.pre``.

The patterns are those that llama.cpp (``llama-vocab.cpp``, ``unicode.cpp``; November 2026) applies
for each name, written for Oniguruma, which the ``tokenizers`` library uses: each pattern cuts every
piece that the one before left. llama.cpp folds all cases of letters into one class in some of them
(``youtu``, ``tiny_aya``, ``tekken``, ``gpt-4o``), and so do we: files are made and tested with it.
Knows nothing of vocabularies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

__all__ = ["PRE_TOKENIZERS", "PreTokenizer"]


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """What follows from a pre-tokenizer's name.

    Attributes:
        patterns: Oniguruma patterns, applied one after another; matches and gaps become pieces.
        ignore_merges: a piece that is a token as a whole is not merged from its characters.
        add_bos: whether text starts with BOS where the file does not say.
        forces_bos: text starts with BOS even if the file denies it, as many files wrongly do.
        byte_level: pieces are spelled in GPT-2's byte alphabet; otherwise in plain UTF-8 with
            ``<0xXX>`` tokens for what the vocabulary lacks.
        escape_spaces: spaces are spelled U+2581.
        digits_from_right: the class of digits that are grouped in threes from the right, if any; a
            long run of them may be cut a multiple of three from its end without changing a piece.
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
_FOLDED = _cased(r"[\p{L}\p{M}]", r"[\p{L}\p{M}]", rf"(?:{_ANY_CASE})?", r"\p{N}{1,3}")
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

_gpt2 = PreTokenizer((_GPT2,))
_digits_gpt2 = PreTokenizer((r"\p{N}", _GPT2))
_llama3 = PreTokenizer((_LLAMA3,))
_llama3_bos = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
_qwen2 = PreTokenizer((_QWEN2,))
_deepseek3 = PreTokenizer((_THREE_DIGITS, _CJK_DEEPSEEK3, _PUNCTUATED))
_bloom = PreTokenizer((_BLOOM,))
_gpt4o = PreTokenizer((_cased(_NOT_LOWER, _NOT_UPPER, rf"(?:{_ANY_CASE})?", _THREE_DIGITS),))
_lines = PreTokenizer((r"[^\n]+|\n+",), byte_level=False, escape_spaces=True)
_bailing = PreTokenizer(
    (
        rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|{_LEAD}\p{{L}}+|\p{{N}}|{_SIGNS}[\r\n]*"
        rf"|\s*[\r\n]|{_SPACES}",
    )
)
_tiny_aya = PreTokenizer((_THREES, _FOLDED), digits_from_right=r"\p{N}")

_FAMILIES: Final[tuple[tuple[str, PreTokenizer], ...]] = (
    (
        "default",
        PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    ),
    (
        "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert"
        " jina-v1-en jina-v2-code roberta-bpe mpt olmo jais trillion granite-docling exaone4",
        _gpt2,
    ),
    ("starcoder refact command-r smollm codeshell exaone minerva-7b mellum2", _digits_gpt2),
    ("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano", _llama3_bos),
    ("dbrx smaug-bpe chatglm-bpe", _llama3),
    ("glm4 glm5", replace(_llama3, ignore_merges=True)),
    (
        "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
        _qwen2,
    ),
    (
        "qwen35",
        PreTokenizer(
            (
                rf"(?:{_ANY_CASE})|{_LEAD}[\p{{L}}\p{{M}}]+|\p{{N}}"
                rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_LINES}|{_SPACES}",
            )
        ),
    ),
    (
        "ufakzeka",
        PreTokenizer(
            (rf"{_LEAD}\p{{L}}+|\p{{N}}|{_SIGNS}[\r\n]*|{_LINES}|{_SPACES}",),
        ),
    ),
    ("seed-coder", PreTokenizer((_words(r"\p{N}", signs=r" ?[^\s\p{L}\p{N}\r\n]+"),))),
    ("minicpm5", PreTokenizer((_THREE_DIGITS, _words(r"\p{N}+")), ignore_merges=True)),
    ("laguna", PreTokenizer((r"[^\n]+|\n+", _QWEN2))),
    (
        "jais-2",
        PreTokenizer(
            (
                rf"(?:{_ANY_CASE})|{_LEAD}\p{{L}}+|\p{{N}}{{1,3}}|{_SIGNS}[\r\n]*|{_LINES}"
                rf"|{_HALVING}|\s{{1,2}}(?!\S)|\s",
            )
        ),
    ),
    (
        "exaone-moe",
        PreTokenizer(
            (
                rf"(?:{_ANY_CASE})|{_LEAD}(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
                rf"|{_SIGNS}[\r\n/]?|\s*[\r\n]|{_SPACES}",
            )
        ),
    ),
    ("bailingmoe bailingmoe2 llada-moe", _bailing),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", _gpt4o),
    (
        "tekken",
        PreTokenizer(
            (_cased(_NOT_LOWER, _NOT_UPPER, "", r"\p{N}"),), ignore_merges=True, add_bos=True
        ),
    ),
    (
        "granite-embed-multi-97m",
        PreTokenizer(
            (
                _cased(
                    r"[[\p{L}\p{M}]&&[^a-z]]",
                    r"[[\p{L}\p{M}]&&[^A-Z]]",
                    rf"(?:{_ANY_CASE})?",
                    _THREE_DIGITS,
                ),
            ),
            ignore_merges=True,
        ),
    ),
    ("tiny_aya cohere2moe", _tiny_aya),
    (
        "youtu",
        PreTokenizer(
            (
                "[\uac00-\ud7a3\u3131-\u318e]+"
                "|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
                "|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
                _cased(r"[\p{L}\p{M}]", r"[\p{L}\p{M}]", rf"(?:{_ANY_CASE})?", r"\p{N}"),
            ),
            ignore_merges=True,
        ),
    ),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", _deepseek3),
    (
        "spark2_5",
        PreTokenizer(
            (
                _THREE_DIGITS,
                _CJK_DEEPSEEK3,
                rf"{_ASCII_SIGN_WORD}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
                rf"| ?[\p{{P}}\p{{S}}]+|[\r\n]|{_SPACES}",
                r"\p{N}",
            )
        ),
    ),
    (
        "deepseek-llm",
        PreTokenizer(
            (
                r"[\r\n]",
                rf"\s?[{_LETTERS_DEEPSEEK}]+",
                "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3001\u3002]+",
                r"\s+$",
                _CJK_DEEPSEEK,
                r"\p{N}+",
            )
        ),
    ),
    (
        "deepseek-coder",
        PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_DEEPSEEK, r"\p{N}")),
    ),
    ("falcon", PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"))),
    ("poro-chat bloom gpt3-finnish", _bloom),
    ("viking", PreTokenizer((_BLOOM, r"\p{N}"))),
    (
        "superbpe",
        PreTokenizer(
            (r"\p{N}+", r"(?=([0-9]{3})++(?![0-9]))"),
            digits_from_right="[0-9]",
        ),
    ),
    ("afmoe", PreTokenizer((_THREES, _CJK_AFMOE, _PUNCTUATED), digits_from_right=r"\p{N}")),
    ("kimi-k2", PreTokenizer((_KIMI,))),
    (
        "chameleon",
        PreTokenizer(
            (
                r"<sentinel:[0-9]+>",
                r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
                r"([\t\n]|    |  )",
                r"\p{N}",
                r"[\p{P}!-/:-@\[-`{-~]",
                _GPT2,
            ),
            add_bos=True,
        ),
    ),
    # Runs of line feeds are tokens that no merges make; llama.cpp looks only them up as a whole.
    (
        "gemma4 granite-embed-multi-311m",
        replace(_lines, ignore_merges=True, add_bos=True, forces_bos=True),
    ),
    ("sarvam-moe", _lines),
    ("whitespace", PreTokenizer((r"\S+",), byte_level=False)),
)

PRE_TOKENIZERS: Final[dict[str, PreTokenizer]] = {
    name: entry for names, entry in _FAMILIES for name in names.split()
}
"""Every value of ``tokenizer.ggml.pre`` that llama.cpp knows."""
