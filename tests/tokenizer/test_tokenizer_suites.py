"""Tokenizers built from real vocabularies give llama.cpp's ids, and their text back."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vocab_files import hard_text, suite

from mlxrun.tokenizer import Tokenizer, load_tokenizer

NAMES = [
    "command-r",
    "deepseek-coder",
    "deepseek-llm",
    "falcon",
    "gpt-2",
    "llama-bpe",
    "llama-spm",
    "phi-3",
    "qwen2",
    "refact",
    "starcoder",
]


@cache
def tokenizer(path: Path) -> Tokenizer:
    return load_tokenizer(path)


def vocab(oracle: Path, name: str) -> Path:
    return oracle / "vocabs" / f"ggml-vocab-{name}.gguf"


@pytest.mark.parametrize("name", NAMES)
def test_every_line_of_llama_cpps_suite(oracle: Path, name: str) -> None:
    path = vocab(oracle, name)
    for text, ids in suite(path):
        assert tokenizer(path).encode(text, add_special=False) == ids, repr(text)


@pytest.mark.parametrize("name", NAMES)
def test_text_survives(oracle: Path, name: str) -> None:
    path = vocab(oracle, name)
    for text, ids in suite(path):
        assert tokenizer(path).decode(ids) == text
        assert tokenizer(path).decode(tokenizer(path).encode(text)) == text


@pytest.mark.parametrize("name", ["gpt-2", "deepseek-coder", "llama-spm"])
@settings(max_examples=60, deadline=None)
@given(text=hard_text)
def test_any_text_survives(oracle: Path, name: str, text: str) -> None:
    tok = tokenizer(vocab(oracle, name))
    text = text.replace("\u2581", "").encode("utf-8", "replace").decode()
    assert tok.decode(tok.encode(text)) == text


@pytest.mark.parametrize("name", ["gpt-2", "llama-spm", "phi-3"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_streaming_equals_decoding(oracle: Path, name: str, data: st.DataObject) -> None:
    tok = tokenizer(vocab(oracle, name))
    ids = data.draw(st.lists(st.integers(0, tok.vocab_size - 1), max_size=30))
    detokenizer = tok.detokenizer()
    parts = [detokenizer.add(index) for index in ids]
    whole = "".join(parts) + detokenizer.finish()
    assert whole == tok.decode(ids)
    # no part holds half a character: only complete characters are emitted
    assert "".join(parts) == whole[: len("".join(parts))]


def test_greedy_texts_of_the_stories_model(oracle: Path) -> None:
    tok = tokenizer(oracle / "stories" / "stories260K.gguf")
    for case in json.loads((oracle / "stories" / "greedy.json").read_text()):
        assert tok.encode(case["prompt"]) == case["prompt_tokens"]
        prompt = tok.decode(case["prompt_tokens"])
        assert tok.decode(case["prompt_tokens"] + case["tokens"]) == prompt + case["text"]


def test_several_templates(oracle: Path) -> None:
    tok = tokenizer(vocab(oracle, "command-r"))
    assert set(tok.chat_templates) == {"default", "tool_use", "rag"}
    messages = [{"role": "user", "content": "Hi"}]
    plain = tok.encode_chat(messages)
    tool = {"name": "add", "description": "adds", "parameter_definitions": {}}
    assert tok.encode_chat(messages, tools=[tool]) != plain
    assert tok.encode_chat(messages, template="default", tools=[tool]) == plain
