"""Every pre-tokenizer that has a name, against llama.cpp."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vocab_files import pairs, write_gguf

from converters.gguf.reader import GGUFFile, read_gguf
from converters.gguf.vocab import PRE_TOKENIZERS
from mlxrun.tokenizer import Tokenizer

FIGURES = Path(__file__).parent.parent / "oracle" / "pretokenizers.json"
CASES: dict[str, Any] = json.loads(FIGURES.read_text("utf-8"))
IDS = {name: group["ids"] for group in CASES["groups"] for name in group["names"]}
FIRST_NAMES = {entry: name for name, entry in reversed(PRE_TOKENIZERS.items()) if name in IDS}


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> GGUFFile:
    return read_gguf(write_gguf(tmp_path_factory.mktemp("pre") / "pairs.gguf", pairs()))


def test_every_name_is_covered() -> None:
    # llama.cpp itself aborts on a byte-level vocabulary with the pre-tokenizer "whitespace"
    assert set(PRE_TOKENIZERS) - set(IDS) == {"whitespace"}
    for name, ids in IDS.items():
        assert IDS[FIRST_NAMES[PRE_TOKENIZERS[name]]] == ids


@pytest.mark.parametrize("name", FIRST_NAMES.values())
def test_same_ids_as_llama_cpp(gguf: GGUFFile, name: str) -> None:
    keys = {**gguf.metadata, "tokenizer.ggml.pre": name}
    tokenizer = Tokenizer.from_gguf(replace(gguf, metadata=keys))
    found = [tokenizer.encode(text, add_special=False) for text in CASES["texts"]]
    assert found == IDS[name]
