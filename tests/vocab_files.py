"""Small GGUF vocabularies to write to disk, and text that tokenizers find hard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from hypothesis import strategies as st

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)

SEPARATOR = "\n__ggml_vocab_test__\n"


def write_gguf(path: Path, metadata: dict[str, Any]) -> Path:
    """A vocabulary-only GGUF file with these keys."""
    writer = gguf.GGUFWriter(path, metadata.get("general.architecture", "llama"))
    for key, value in metadata.items():
        if key == "general.architecture" or key.startswith("GGUF."):
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_array(key, value.tolist() if isinstance(value, np.ndarray) else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def spm(words: list[str] | None = None, **more: Any) -> dict[str, Any]:
    """An SPM vocabulary: letters, some words, all bytes, <|im_start|> and <|im_end|>."""
    words = words if words is not None else ["he", "ll", "hell", "▁w", "or", "ld", "▁wor", "▁▁"]
    single = ["▁", *"abcdefghijklmnopqrstuvwxyz<|>_/\n.,!"]
    rows = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    rows += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    rows += [(word, -float(index), NORMAL) for index, word in enumerate(words)]
    rows += [(text, -1000.0 - index, NORMAL) for index, text in enumerate(single)]
    rows += [(text, 0.0, CONTROL) for text in ("<|im_start|>", "<|im_end|>")]
    tokens, scores, types = map(list, zip(*rows, strict=True))
    return keys(model="llama", tokens=tokens, scores=scores, token_type=types) | keys(**more)


def bpe(pre: str = "gpt-2", **more: Any) -> dict[str, Any]:
    """A byte-level BPE vocabulary with a few merges, <|im_start|>, <|im_end|> and <tool>."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(68)]
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld", "Ġ Ġ"]
    tokens = letters + [merge.replace(" ", "") for merge in merges]
    tokens += ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>"]
    types = [NORMAL] * (len(tokens) - 4) + [CONTROL] * 3 + [USER]
    ids = {"bos_token_id": len(tokens) - 4, "eos_token_id": len(tokens) - 4}
    base = keys(model="gpt2", pre=pre, tokens=tokens, token_type=types, merges=merges, **ids)
    return base | keys(**more)


def keys(**values: Any) -> dict[str, Any]:
    """Keyword arguments as ``tokenizer.ggml.*`` keys; ``chat_template`` as it stands."""
    return {
        f"tokenizer.{name}" if name.startswith("chat_template") else f"tokenizer.ggml.{name}": value
        for name, value in values.items()
    }


def suite(vocab: Path) -> list[tuple[str, list[int]]]:
    """llama.cpp's own cases for a vocabulary: text and ids."""
    texts = vocab.with_name(f"{vocab.name}.inp").read_bytes().decode().split(SEPARATOR)
    lines = vocab.with_name(f"{vocab.name}.out").read_text().split("\n")
    return [
        (text, [int(word) for word in line.split()])
        for text, line in zip(texts, lines[: len(texts)], strict=True)
    ]


_HARD = """
hello world Hello WORLD'S don't I'LL 1234567 3.14 École naïve ßü русский 中文字 かな 한국어 עברית
हिन्दी ไทย 🦙 👨‍👩‍👧 é ½ Ⅷ ٣٤ <s> </s> <|im_start|> <|im_end|> <|endoftext|> <tool> <0x0A> == // ...
"""
_SPACES = [" ", "  ", "\n", "\n\n\n", "\t", "\r\n", "\u3000", "\xa0", "\x00", "\x85", "\u200d"]
_PARTS = [*_HARD.split(), *_SPACES]

hard_text = st.lists(st.sampled_from(_PARTS) | st.text(max_size=4), max_size=12).map("".join)
"""Text of everything that tokenizers get wrong."""


def pairs() -> dict[str, Any]:
    """A byte-level vocabulary in which any two bytes merge: every cut between words shows."""
    letters = bpe()["tokenizer.ggml.tokens"][:256]
    ranked = sorted(range(1 << 16), key=lambda number: number * 40503 % 65537)
    merges = [(letters[number >> 8], letters[number & 255]) for number in ranked]
    tokens = [*letters, *(left + right for left, right in merges), "<|endoftext|>"]
    types = [NORMAL] * (len(tokens) - 1) + [CONTROL]
    ids = {"bos_token_id": len(tokens) - 1, "eos_token_id": len(tokens) - 1}
    spelled = [f"{left} {right}" for left, right in merges]
    return keys(model="gpt2", pre="gpt-2", tokens=tokens, token_type=types, merges=spelled, **ids)
