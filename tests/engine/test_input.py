"""From a caller's options to an engine's request."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from tiny_models import Tiny

import mlxrun
from mlxrun.errors import ParameterError
from mlxrun.outputs import Request
from mlxrun.sampling_params import SamplingParams


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
            llm.inputs.sampler(Request([5, 6, 7], params))
        assert looked == [times * tokenizer.vocab_size]


@pytest.mark.parametrize("name", ["parallel", "deterministic", "temperature"])
def test_the_error_of_a_misspelt_option_of_a_batch_names_the_nearest(
    llm: mlxrun.LLM, name: str
) -> None:
    with pytest.raises(ParameterError, match=rf"such as {name}"):
        llm.batch(["a"], **{f"{name}s": 1})  # type: ignore[arg-type]


USER = {"role": "user", "content": "tea"}


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "messages must be at least one message long"),
        (["hi"], "messages[0] must be a mapping such as"),
        ([USER, "hi"], "messages[1] must be a mapping such as"),
        ([{"content": "hi"}], "messages[0] must be a message with a role"),
        ([USER, {"role": "user"}], "messages[1] must be a message with content"),
        ([{"role": "assistant", "content": None}], "messages[0] must be a message with content"),
        ([{"role": "user", "content": ["hi"]}], "messages[0]['content'] must be made of parts"),
        (
            [USER, {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            "messages[1]['content'] must be made of parts such as",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": None}]}],
            "messages[0]['content'] must be made of parts such as",
        ),
    ],
)
def test_errors_name_the_problem_of_a_conversation(
    llm: mlxrun.LLM, messages: list[Any], says: str
) -> None:
    with pytest.raises(ParameterError) as caught:
        llm.chat(messages, max_tokens=1)
    assert str(caught.value).startswith(says)
    if messages and isinstance(messages[0], dict):
        with pytest.raises(ParameterError) as caught:
            llm.batch([messages], max_tokens=1)
        assert str(caught.value).startswith(says)


def test_errors_name_the_problem_of_a_prompt(llm: mlxrun.LLM) -> None:
    with pytest.raises(ParameterError, match="prompt must be a list of messages"):
        llm.generate(USER)  # type: ignore[arg-type]
    for empty in ([], ()):
        for use in (llm.generate, llm.logits):
            with pytest.raises(ParameterError, match=r"one token long, not \[\]"):
                use(empty)


def test_a_turn_that_calls_a_tool_needs_no_content(llm: mlxrun.LLM) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    thought = {"role": "assistant", "content": None, "reasoning_content": "hm"}
    for turn in (call, thought):
        try:
            llm.chat([USER, turn, USER], max_tokens=1)
        except mlxrun.MlxrunError as error:
            assert "content" not in str(error).split(":")[0]  # what the template makes of it


def test_parts_of_text_are_a_text(llm: mlxrun.LLM) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    expected = llm.chat([{"role": "user", "content": "one\ntwo"}], max_tokens=4, seed=1)
    got = llm.chat([{"role": "user", "content": parts}], max_tokens=4, seed=1)
    assert got.tokens == expected.tokens
    assert got.usage.prompt_tokens == expected.usage.prompt_tokens


@pytest.mark.parametrize(
    "options",
    [
        {"parse_special": 1},
        {"parse_special": "no"},
        {"template": 5},
        {"template": {"messages": []}},
        {"progress": 5},
    ],
    ids=str,
)
def test_options_of_the_wrong_type_are_refused(llm: mlxrun.LLM, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ParameterError) as caught:
        llm.stream("tea", **options)
    assert caught.value.name == name
    with pytest.raises(ParameterError):
        llm.batch(["tea"], **options)


def test_callbacks_are_functions(llm: mlxrun.LLM) -> None:
    for use in (
        lambda: llm.batch(["tea"], on_token=5),  # type: ignore[arg-type]
        lambda: llm.perplexity("some text " * 9, context=16, progress=5),
        lambda: mlxrun.load(llm.source, progress=5),  # type: ignore[arg-type]
    ):
        with pytest.raises(ParameterError, match="a function of"):
            use()


def test_a_bias_leaves_a_token(llm: mlxrun.LLM) -> None:
    size = llm.model.vocab_size
    banned = dict.fromkeys(range(size), -math.inf)
    with pytest.raises(ParameterError, match="logit_bias"):
        llm.stream("tea", logit_bias=banned)
    with llm.engine(parallel=1) as engine, pytest.raises(ParameterError, match="logit_bias"):
        engine.submit(Request([5], SamplingParams(logit_bias=banned)))
    del banned[70]
    assert llm.generate("tea", logit_bias=banned, max_tokens=2, ignore_eos=True).tokens == [70, 70]
