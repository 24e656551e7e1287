"""Thinking and answer are split wherever chunks end."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import Tiny

import mlxrun
from mlxrun.cli.conversation import Conversation
from mlxrun.cli.thinking import MARKERS, Splitter, Thinking
from mlxrun.outputs import Chunk

THINKS = {"<think>": "</think>"}
CASES = [
    (None, "plain", "", "plain"),
    (None, "<think>why</think>because", "why", "because"),
    (None, "<think>\nwhy\n</think>\n\nbecause", "why\n", "because"),
    (None, "\n<think>why</think>because", "why", "\nbecause"),
    (None, "<think>never closed", "never closed", ""),
    (None, "<think></think>\n\nat once", "", "at once"),
    (None, "<think>a</think>one\n<think>b</think>", "a", "one\n<think>b</think>"),
    (None, "<think>a</think> <think>b</think> two", "ab", "two"),
    (None, "Write <think> to think, </think> to end", "", None),
    (None, "Use:\n```\n<think>\n```\nfine.", "", None),
    ("</think>", "why</think>Use:\n<think>\nfine", "why", "Use:\n<think>\nfine"),
    (None, "a < b <th", "", None),
    ("</think>", "why</think>because", "why", "because"),
    ("</think>", "why <think> it</think>\nbecause", "why <think> it", "because"),
    ("</think>", "why</thin", "why</thin", ""),
]


@pytest.mark.parametrize(("closing", "completion", "thought", "answer"), CASES)
@given(cuts=st.sets(st.integers(0, 45)))
def test_thinking_and_answer_of_a_completion_in_chunks(closing, completion, thought, answer, cuts):
    splitter = Splitter(THINKS, closing)
    ends = [0, *sorted(cut for cut in cuts if cut < len(completion)), len(completion)]
    spans = []
    for start, end in pairwise(ends):
        spans += splitter.add(completion[start:end])
    spans += splitter.finish()
    assert all(text for text, _ in spans)
    assert "".join(text for text, thinks in spans if thinks) == thought
    assert "".join(text for text, thinks in spans if not thinks) == (
        completion if answer is None else answer
    )


def test_only_a_possible_marker_is_held_back():
    splitter = Splitter(THINKS)
    assert splitter.add("\n <") == [("\n ", False)]
    assert splitter.add("3") == [("<3", False)]
    assert splitter.add(" and <") == [(" and <", False)]
    splitter = Splitter(THINKS, "</think>")
    assert splitter.add("1 </") == [("1 ", True)]
    assert splitter.add("2") == [("</2", True)]


TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
OPENED = TEMPLATE + "[assistant]<think>\n{# ... </think> #}"


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> mlxrun.LLM:
    return load(tmp_path_factory.mktemp("plain"), TEMPLATE)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory) -> mlxrun.LLM:
    return load(tmp_path_factory.mktemp("thinker"), OPENED)


def load(folder: Path, template: str) -> mlxrun.LLM:
    return mlxrun.load(
        Tiny(keys={"context_length": 256}, template=template).write(folder / "x.gguf")
    )


def test_markers_are_those_of_the_template(plain, thinker):
    assert Thinking(plain.tokenizer).markers == {}
    assert Thinking(thinker.tokenizer).markers == THINKS


def test_a_prompt_may_open_the_thinking(thinker):
    chat = Conversation(thinker, thinker.session(), settings={"max_tokens": 8})
    spans = list(chat.ask("one"))
    assert spans and all(thought for _, thought in spans)
    assert chat.messages[-1]["content"].strip()  # raw


@pytest.mark.parametrize("command", [["chat"], ["generate", "--chat"]])
def test_thinking_in_a_pipe(mlxrun_cli, thinker, command):
    """Here all of a completion is thinking: the prompt opens it, and the model never closes it."""
    options = ["--temp", "0", "-n", "8"]
    shown = mlxrun_cli(*command, thinker.source, *options, "--think", "show", stdin=b"one")
    hidden = mlxrun_cli(*command, thinker.source, *options, stdin=b"one")
    assert shown.out.strip() and not hidden.out.strip()
    assert "--think show" in hidden.error and not shown.err


@pytest.mark.parametrize("options", [[], ["--chat", "--json"]])
def test_think_without_a_chat(mlxrun_cli, options):
    result = mlxrun_cli("generate", "nowhere.gguf", "-p", "x", "--think", "hide", *options)
    assert result.code == 2 and "--think is for --chat" in result.err


def test_the_answer_of_a_stored_completion(thinker):
    thinking = Thinking(thinker.tokenizer)
    for completion in ("<think>why</think>\n\nbecause", "why</think>\n\nbecause", "because"):
        assert thinking.answer(completion) == "because"


def test_markers_that_are_control_tokens_are_text(thinker):
    """A completion's text leaves control tokens out."""
    thinking = Thinking(thinker.tokenizer)
    thinking.controls = {7: "[THINK]", 8: "[/THINK]"}
    chunks = [Chunk("", (7,)), Chunk("why", (20,)), Chunk("", (8,)), Chunk("because", (21,))]
    assert "".join(map(thinking.text, chunks)) == "[THINK]why[/THINK]because"
    assert MARKERS["[THINK]"] == "[/THINK]"
