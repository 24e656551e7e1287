"""The texts of the figures: strings from a seed, prompts, and a story.

Standard library only, and nothing of it that another version of Python or of Unicode could change:
llama.cpp's figures and the tests are of the same strings on every machine.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from pathlib import Path

STRINGS = 2000

#: Written for this purpose.
STORY = (Path(__file__).parent / "text.txt").read_text(encoding="utf-8")

_CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"

#: Prompts to continue, whose control tokens are such.
PROMPTS = {
    "capital": "The capital of France is",
    "counting": "One, two, three, four, five, six,",
    "code": "def fibonacci(n):\n",
    "json": '{"name": "Ada", "age": 36, "languages": [',
    "recipe": "To bake a simple loaf of bread, you need",
    "story": "Once upon a time, in a small village by the sea, there lived",
    "science": "Photosynthesis is the process by which plants",
    "dialogue": '"Where are you going?" she asked.\n"',
    "german": "Der Himmel ist blau und die Sonne",
    "letter": "Dear Sir or Madam,\n\nI am writing to you because",
    "table": "| city | country |\n|---|---|\n| Paris | France |\n| Rome |",
    "news": "Scientists announced on Monday that",
    "question": _CHAT.format("What is the capital of France?"),
    "task": _CHAT.format("Write a short poem about the sea."),
}

# First and last code points, whose characters a script's words are made of.
_SCRIPTS = {
    "latin": (0x61, 0x7A), "accents": (0xC0, 0x17F), "greek": (0x391, 0x3C9),
    "cyrillic": (0x410, 0x44F), "armenian": (0x561, 0x586), "hebrew": (0x5D0, 0x5EA),
    "arabic": (0x621, 0x64A), "devanagari": (0x905, 0x94D), "bengali": (0x985, 0x9CD),
    "tamil": (0xB85, 0xBCD), "thai": (0xE01, 0xE4E), "georgian": (0x10D0, 0x10F0),
    "hangul": (0xAC00, 0xD7A3), "hiragana": (0x3041, 0x3096), "katakana": (0x30A1, 0x30FA),
    "han": (0x4E00, 0x9FA5), "rare han": (0x20000, 0x2A6D6), "ethiopic": (0x1200, 0x1248),
    "cherokee": (0x13A0, 0x13F4), "mathematics": (0x1D400, 0x1D454), "gothic": (0x10330, 0x1034A),
    "fullwidth": (0xFF01, 0xFF5E),
}  # fmt: skip
_WORDS = (
    "the", "of", "and", "to", "in", "that", "it", "was", "for", "you're", "don't", "I'll",
    "she's", "they've", "we'd", "I'm", "CAN'T", "It'S", "London", "naïve", "café", "Ångström",
    "NASA", "iPhone", "e.g.", "U.S.A.", "state-of-the-art", "co-op", "O'Neill", "hello",
    "world", "token", "antidisestablishmentarianism", "rhythm", "queue", "3rd", "20th", "x2",
    "C++", "C#", ".NET", "node.js", "@user", "#tag", "$5", "50%", "señor", "über", "Straße",
    "œuvre", "ﬁne", "½", "²", "™", "…", "—", "–", "“quoted”", "‘so’", "«là»", "(„hier“)", "a/b",
    "and/or", "e-mail",
)  # fmt: skip
_EMOJI = (
    "😀", "😂", "❤️", "❤", "👍🏽", "👩\u200d👩\u200d👧\u200d👦", "🏳️\u200d🌈", "🇫🇷", "🇩🇪🇺🇸", "1️⃣",
    "🤷🏿\u200d♀️", "🧑\u200d💻", "☺️", "☕", "⚡", "🫠", "🦆", "🀄", "♟️", "⏩",
    "🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f", "👁️\u200d🗨️",
)  # fmt: skip
_CODE = (
    "def f(x):\n    return x ** 2\n", "for (int i = 0; i < n; ++i) {\n\ta[i] = b[i];\n}\n",
    "if (x == null && y != 0) { return -1; }", "SELECT * FROM t WHERE a >= 'x' -- c\n",
    '<div class="a b">&nbsp;</div>\n', "</table>\n</body>", "\t\tcase 0x1F: break;\n",
    "#include <stdio.h>\n\n\nint main(void) {", "let v: Vec<u8> = vec![0; 10];\n",
    "```python\n", "x = [[1,2],[3,4]][::-1]", "$ cat /etc/hosts | grep -v '^#'\n",
    "a->b.c::d<e>()", "\\frac{1}{2}", "class A(B):\n        pass\n\n\n    # end\n",
    '{"k": [null, true, 1e-9]}', "%s\\n\\t\\x00", "http://example.org/a?b=c&d=%20#e",
    "user.name+tag@example.co.uk", "C:\\Windows\\System32\\", "\r\n\r\n", "===", "!!!???",
    "--------", "/* *//**/", "();", "'''", "..", "...", "`", "~~",
)  # fmt: skip
_NUMBERS = (
    "{0}", "{0}.{1}", "{0},{1:03}", "-{0}", "+{0} {1}", "0x{0:x}", "{0:b}", "{0}e-{1}",
    "${0}.00", "{0}/{1}", "{0:04}-{1:02}", "{0}:{1:02}", "v{0}.{1}.0", "{0}%", "({0})", "{0}th",
    "№{0}", "{0}²",
)  # fmt: skip
_SPACES = (
    " ", "  ", "   ", " " * 7, " " * 16, " " * 31, "\n", "\n\n", "\n\n\n", "\n" * 8, "\t", "\t\t\t",
    "\r\n", "\r", " \n", "\n ", "\t \t", "\u00a0", "\u2003", "\u3000", "\u200b", "\u200d", "\u2028",
    "\u0085", "\u000b", "\u000c", "\ufeff",
)  # fmt: skip
_CONTROL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<file_sep>", "<bos>",
    "<eos>", "<pad>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>", "<unused0>",
    "<unused98>", "<s>", "</s>", "<0x0A>", "[INST]", "<|im_start", "im_end|>", "< bos >",
    "<BOS>", "<<bos>>", "▁", "Ġ", "Ċ", "<h1>", "</i>", "[multimodal]", "<issue_comment>",
    "<jupyter_code>", "<empty_output>",
)  # fmt: skip
_MARKS = tuple(map(chr, (0x300, 0x301, 0x308, 0x323, 0x33F, 0x489, 0x5B0, 0x64B, 0x93C, 0x20DD)))
_EDGES = (
    "", " ", "\n", "\t", "\0", "a\0b", "▁", "▁▁ ▁", "Ġ", "\ufffd", "\ufeffBOM", "\U0010ffff",
    "\ud7ff", "\ue000", "a", "A", "é", "e\u0301", "ﬀ", "İ", "ß", "ẞ", "\u1e9b\u0323", "각",
    "\u1100\u1161\u11a8",
)  # fmt: skip

Rng = random.Random
Maker = Callable[[Rng], str]


def _pick(rng: Rng, choices: Sequence[str], fewest: int, most: int) -> list[str]:
    return [rng.choice(choices) for _ in range(rng.randint(fewest, most))]


def _characters(rng: Rng, first: int, last: int, most: int) -> str:
    return "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, most)))


def _prose(rng: Rng) -> str:
    words = _pick(rng, _WORDS, 2, 12)
    return "".join(word + rng.choice((" ", " ", " ", ", ", ". ", "\n")) for word in words)


def _script(rng: Rng) -> str:
    names = _pick(rng, tuple(_SCRIPTS), 1, 2)
    words = [_characters(rng, *_SCRIPTS[rng.choice(names)], 9) for _ in range(rng.randint(1, 5))]
    return rng.choice((" ", " ", "", "-", "、")).join(words)


def _emoji(rng: Rng) -> str:
    return rng.choice(("", " ", "\u200d")).join(_pick(rng, _EMOJI, 1, 6))


def _code(rng: Rng) -> str:
    return "".join(_pick(rng, _CODE, 1, 4))


def _number(rng: Rng) -> str:
    forms = _pick(rng, _NUMBERS, 1, 5)
    numbers = [
        form.format(rng.randrange(10 ** rng.randint(1, 12)), rng.randrange(100)) for form in forms
    ]
    return rng.choice((" ", "", ", ", "\t")).join(numbers)


def _space(rng: Rng) -> str:
    gaps = _pick(rng, _SPACES, 1, 6)
    return "".join(gap + rng.choice((*_WORDS[:9], "", "", "")) for gap in gaps)


def _control(rng: Rng) -> str:
    parts = _pick(rng, _CONTROL, 1, 5)
    return "".join(rng.choice(("", " ", "\n", "user", "a ")) + part for part in parts)


def _long(rng: Rng) -> str:
    letters = "".join(_pick(rng, "abcdefghijklmnopqrstuvwxyzABCXYZ0189_+/=", 30, 90))
    part = rng.choice(("a", "ab", "=", "-=", "GATTACA", "ха", "哈", "é", "!?", "🎉", "0", "\\"))
    return rng.choice((letters, part * rng.randint(20, 70)))


def _marked(rng: Rng) -> str:
    return "".join(letter + "".join(_pick(rng, _MARKS, 0, 3)) for letter in rng.choice(_WORDS))


def _any(rng: Rng) -> str:
    """Any code points that UTF-8 can hold, assigned or not."""
    points = (rng.randrange(2 ** rng.randint(5, 20)) for _ in range(rng.randint(1, 12)))
    return "".join(map(chr, (point for point in points if not 0xD800 <= point <= 0xDFFF)))


_MAKERS: tuple[Maker, ...] = (
    _prose, _prose, _script, _script, _emoji, _code, _number, _space, _control, _long, _marked,
    _any,
)  # fmt: skip


def _mixed(rng: Rng) -> str:
    return "".join(rng.choice(_MAKERS)(rng)[:40] for _ in range(rng.randint(2, 4)))


def strings() -> list[str]:
    """Strings of every kind that a tokenizer may find hard, the same ones each time."""
    rng = random.Random(13)
    makers = (*_MAKERS, _mixed, _mixed)
    made = (makers[index % len(makers)](rng) for index in range(STRINGS - len(_EDGES)))
    return [*_EDGES, *made]


def fingerprint(texts: Sequence[str]) -> str:
    """A digest of strings in their order."""
    joined = "".join(f"{len(text)}:{text}" for text in texts)
    return hashlib.sha256(joined.encode()).hexdigest()
