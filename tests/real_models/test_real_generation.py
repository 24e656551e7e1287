"""Continuations are llama.cpp's: alone, in batches, in sessions, and up to stop strings.

Greedy tokens are compared up to where llama.cpp's two best logits are nearer than ``CLOSE``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from real_models import Figures
from real_texts import PROMPTS

import mlxrun

GREEDY = {"temperature": 0, "ignore_eos": True}
COUNT = 32
# Continued alone, too; all are in a batch.
ALONE = ("capital", "counting", "code", "story", "german", "table", "question", "task")


def test_enough_is_certain(figures: Figures) -> None:
    certain = [len(each.certain) for each in figures.continuations.values()]
    assert len(certain) == len(PROMPTS) >= 12
    assert sum(certain) > 0.8 * COUNT * len(PROMPTS)


@pytest.mark.parametrize("name", ALONE)
def test_continuations_are_llama_cpps(llm: mlxrun.LLM, figures: Figures, name: str) -> None:
    """Tokens and text, up to what ends a turn where that comes first."""
    each = figures.continuations[name]
    got = llm.generate(PROMPTS[name], parse_special=True, temperature=0, max_tokens=COUNT)
    certain = each.certain[: each.ends]
    assert got.usage.prompt_tokens == len(each.prompt)
    assert got.tokens[: len(certain)] == certain
    if each.ends is not None and each.ends < len(each.certain):
        mark = llm.tokenizer.piece(each.tokens[each.ends])
        assert (got.text, got.finish_reason) == (each.text.partition(mark)[0], "stop")
    elif len(each.certain) == COUNT:
        assert (got.text, got.finish_reason) == (each.text, "length")


def test_a_batch_continues_as_llama_cpp_does(llm: mlxrun.LLM, figures: Figures) -> None:
    wanted = figures.continuations.values()
    got = llm.batch([each.prompt for each in wanted], max_tokens=COUNT, **GREEDY)
    for one, own in zip(got, wanted, strict=True):
        assert one.tokens[: len(own.certain)] == own.certain


def test_seeds_in_a_batch_sample_the_same_tokens_as_alone(
    llm: mlxrun.LLM, figures: Figures
) -> None:
    prompts = [figures.continuations[name].prompt for name in ("story", "science", "code", "news")]
    own = {
        "temperature": [0.2, 0.8, 1.0, 1.5],
        "seed": [1, 2, 3, 2**40],
        "max_tokens": [16, 9, 12, 14],
    }
    together = llm.batch(prompts, **own)
    for index, (prompt, got) in enumerate(zip(prompts, together, strict=True)):
        alone = llm.generate(prompt, **{name: values[index] for name, values in own.items()})
        assert (got.tokens, got.text) == (alone.tokens, alone.text)


@pytest.mark.parametrize("name", ["recipe", "news"])
@pytest.mark.parametrize("border", [2, 5, 9])
def test_stop_strings_across_tokens(
    llm: mlxrun.LLM, figures: Figures, name: str, border: int
) -> None:
    """A string of the last character before a border of tokens and the first ones after it."""
    each = figures.continuations[name]
    assert border + 3 < len(each.certain)
    at = len(b"".join(map(llm.tokenizer.token_bytes, each.tokens[:border])).decode())
    stop = each.text[at - 1 : at + 2]
    expected = each.text[: each.text.index(stop)]
    got = llm.generate(each.prompt, max_tokens=COUNT, stop=[stop, "never there"], **GREEDY)
    assert (got.text, got.finish_reason) == (expected, "stop")


def test_a_session_continues_as_a_fresh_run(
    llm: mlxrun.LLM, figures: Figures, tmp_path: Path
) -> None:
    """In a second request, from a file, in a fork, and after another continuation was tried."""
    half = COUNT // 2
    each = figures.continuations["recipe"]
    session = llm.session()
    first = llm.generate(each.prompt, session=session, max_tokens=half, **GREEDY)
    session.save(tmp_path / "saved")
    longer = [*each.prompt, *first.tokens]
    ways = {"fork": session.fork(), "file": llm.load_session(tmp_path / "saved"), "back": session}
    llm.generate([*longer[:-4], *each.prompt], session=session, max_tokens=4, seed=1)
    for way, own in ways.items():
        second = llm.generate(longer, session=own, max_tokens=COUNT - half, **GREEDY)
        assert second.usage.cached_tokens >= len(longer) - (5 if way == "back" else 1)
        assert [*first.tokens, *second.tokens][: len(each.certain)] == each.certain, way
