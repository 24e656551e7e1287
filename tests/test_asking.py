"""From what a caller asks for to what an engine takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import Tiny

import mlxrun
from mlxrun.errors import ParameterError
from mlxrun.generation.parameters import SamplingParams
from mlxrun.generation.request import Request


@pytest.fixture
def llm(tmp_path: Path) -> mlxrun.LLM:
    return mlxrun.load(Tiny(layers=1).write(tmp_path / "x.gguf"))


def test_the_vocabulary_is_looked_through_once_for_the_same_breakers(
    llm: mlxrun.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, looked = llm.tokenizer, [0]
    known = tokenizer.token_bytes

    def counted(token: int) -> bytes:
        looked[0] += 1
        return known(token)

    monkeypatch.setattr(tokenizer, "token_bytes", counted)
    for times, breakers in enumerate([("\n", "e"), ("t",)], 1):
        for _ in range(3):
            params = SamplingParams(dry_multiplier=0.8, dry_sequence_breakers=breakers)
            llm.asker.sampler(Request([5, 6, 7], params))
        assert looked == [times * tokenizer.vocab_size]


@pytest.mark.parametrize("name", ["parallel", "deterministic", "temperature"])
def test_a_misspelt_option_of_a_batch_is_told_its_name(llm: mlxrun.LLM, name: str) -> None:
    with pytest.raises(ParameterError, match=rf"such as {name}"):
        llm.batch(["a"], **{f"{name}s": 1})  # type: ignore[arg-type]
