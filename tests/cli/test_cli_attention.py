"""Attention patterns, on the command line and in the API."""

from __future__ import annotations

import pytest

from mlxrun.errors import CacheError, ParameterError
from mlxrun.kv_cache.sparse import BlockCache, StridedCache

PROMPT = [*range(3, 90)]
OPTIONS = {"temperature": 0, "ignore_eos": True, "max_tokens": 20}


def test_generate_attends_as_the_api_does(mlxrun_cli, model, llm):
    text = "tea for two and two for tea " * 3
    args = ("--temp", "0", "--ignore-eos", "-n", "20", "-p", text, "--cache-type-k", "q8")
    for pattern in ("blocks:3x4", "strided:4/9", "window:6+2"):
        result = mlxrun_cli("generate", model, *args, "--attention", pattern)
        expected = llm.generate(text, **OPTIONS, attention=pattern, cache_type_k="q8")
        assert (result.code, result.out) == (0, expected.text + "\n")
        session = llm.session(attention=pattern, cache_type_k="q8")
        assert llm.generate(text, **OPTIONS, session=session).tokens == expected.tokens


def test_patterns_change_tokens_and_dense_does_not(llm):
    plain = llm.generate(PROMPT, **OPTIONS).tokens
    for pattern in ("dense", "blocks:14x8", "strided:107/2", "window:107"):
        assert llm.generate(PROMPT, **OPTIONS, attention=pattern).tokens == plain
    for pattern in ("blocks:3x2", "strided:2/50", "window:2"):
        assert llm.generate(PROMPT, **OPTIONS, attention=pattern).tokens != plain


def test_a_window_by_either_name(llm):
    session = llm.session(window=20, keep=3)
    named = llm.session(attention="window:20+3")
    assert named.windowed and named.options == session.options
    tokens = llm.generate(PROMPT, **OPTIONS, session=session).tokens
    assert llm.generate(PROMPT, **OPTIONS, session=named).tokens == tokens
    assert llm.generate(PROMPT, **OPTIONS, attention="window:20+3").tokens == tokens


@pytest.mark.parametrize(
    ("pattern", "kind"), [("blocks:3x4", BlockCache), ("strided:4/9", StridedCache)]
)
def test_a_batch_and_an_engine_attend_as_one_alone_does(llm, pattern, kind):
    assert isinstance(llm.session(attention=pattern).cache[0], kind)
    prompts = [PROMPT[:n] for n in (87, 20, 55)]
    alone = [llm.generate(p, **OPTIONS, attention=pattern).tokens for p in prompts]
    for deterministic in (False, True):
        together = llm.batch(prompts, **OPTIONS, attention=pattern, deterministic=deterministic)
        assert [each.tokens for each in together] == alone
    with llm.engine(attention=pattern) as engine:
        handles = [engine.submit(prompt, **OPTIONS) for prompt in prompts]
        assert [handle.result().tokens for handle in handles] == alone


def test_a_conversation_goes_back(llm):
    for pattern in ("blocks:3x4", "strided:4/9"):
        session = llm.session(attention=pattern)
        for prompt in (PROMPT, [*PROMPT[:70], 7, 7]):
            again = llm.generate(prompt, session=session, **OPTIONS)
            assert again.tokens == llm.generate(prompt, **OPTIONS, attention=pattern).tokens
        assert again.usage.cached_tokens == 70


def test_chat(mlxrun_cli, model):
    args = ("--temp", "0", "--max-tokens", "9", "--attention", "blocks:3x4")
    result = mlxrun_cli("chat", model, *args, stdin=b"one\ntwo\n")
    assert (result.code, result.err) == (0, "")
    assert result.out.count("\n") >= 2


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize(
    "pattern",
    ["", "blocks", "blocks:2x64", "blocks:8x0", "strided:8", "strided:0/4", "strided:4/0",
     "window:0", "window:4+", "window:4-1", "windows:4", "blocks:8x4x2", "blocks:99999999x8"],
)  # fmt: skip
def test_wrong_patterns_are_one_line_before_anything_is_loaded(mlxrun_cli, command, pattern):
    result = mlxrun_cli(command, "absent.gguf", "--attention", pattern)
    assert result.code == 2
    assert "attention must be dense, window:1024+4" in result.err.splitlines()[-1]


def test_what_does_not_go_together_says_so(mlxrun_cli, model, llm):
    both = mlxrun_cli("chat", model, "--window", "9", "--attention", "blocks:3x4", stdin=b"a\n")
    assert (both.code, both.err.splitlines()[-1]) == (
        2, "Error: --attention and --window exclude each other."
    )  # fmt: skip
    packed = ("--attention", "strided:4/2", "--cache-type-k", "q4c/32")
    assert "cannot be seen in part" in mlxrun_cli("generate", model, "-p", "a", *packed).error
    with pytest.raises(ParameterError, match="left out where a window is given"):
        llm.session(window=9, attention="strided:4/2")
    with pytest.raises(ParameterError, match="session must be left out"):
        llm.stream("a", session=llm.session(), attention="blocks:3x4")
    with pytest.raises(ParameterError, match="attention must be dense"):
        llm.batch(["a"], attention=3)
    with pytest.raises(CacheError, match="cannot be seen in part"):
        llm.engine(attention="blocks:3x4", cache_type_k="q4c/32")


def cold(llm, prompt, **options):
    llm.prefix_cache.clear()
    completion = llm.generate(prompt, **OPTIONS, session=llm.session(**options))
    assert completion.usage.cached_tokens == 0
    return completion.tokens


@pytest.mark.parametrize("pattern", ["blocks:3x4", "strided:4/9"])
def test_prompts_are_shared_with_dense_requests_but_completions_are_not(llm, pattern):
    for attention in (None, pattern):
        llm.prefix_cache.clear()
        sampled = llm.generate(PROMPT, **OPTIONS, session=llm.session(attention=pattern)).tokens
        longer = [*PROMPT, *sampled, 5, 6, 7]
        again = llm.generate(longer, **OPTIONS, session=llm.session(attention=attention))
        assert again.usage.cached_tokens == len(PROMPT)
        assert again.tokens == cold(llm, longer, attention=attention)


def test_a_saved_session_continues(llm, tmp_path):
    path = tmp_path / "talk.cache"
    session = llm.session(attention="blocks:3x4")
    first = [*PROMPT, *llm.generate(PROMPT, **OPTIONS, session=session).tokens]
    session.save(path)
    llm.prefix_cache.clear()
    loaded = llm.load_session(path)
    assert (loaded.options, loaded.tokens) == (session.options, session.tokens)
    again = llm.generate([*first, 9], **OPTIONS, session=loaded)
    assert again.usage.cached_tokens == len(first) - 1
    assert again.tokens == llm.generate([*first, 9], **OPTIONS, session=session).tokens
    llm.prefix_cache.clear()
    with pytest.warns(UserWarning, match="saved with other options"):
        assert llm.load_session(path, keep=0).tokens == []
