"""Types of keys and values on the command line and in the API."""

from __future__ import annotations

import pytest

import mlxrun
from mlxrun.cli.inspection import inspect_model
from mlxrun.errors import CacheError, ParameterError
from mlxrun.kv_cache.options import NAMES, PER_CHANNEL

TYPES = {"cache_type_k": "q8", "cache_type_v": "q4"}


def test_generate_stores_what_the_api_stores(mlxrun_cli, model, llm):
    args = ("--temp", "0", "--ignore-eos", "-n", "30", "-p", "tea")
    options = {"temperature": 0, "ignore_eos": True, "max_tokens": 30}
    result = mlxrun_cli("generate", model, *args, "--cache-type-k", "q8", "--cache-type-v", "q4")
    expected = llm.generate("tea", **options, **TYPES)
    assert (result.code, result.out) == (0, expected.text + "\n")
    session = llm.session(**TYPES)
    assert llm.generate("tea", **options, session=session).tokens == expected.tokens
    # 2 layers of 2 heads, 16 wide: a byte a number, or half of one, and scales for 32 of them.
    assert session.nbytes == 256 * 2 * (32 + 8 + 16 + 8)


def test_chat_with_a_window(mlxrun_cli, model):
    args = ("--temp", "0", "--max-tokens", "9", "--window", "40")
    result = mlxrun_cli("chat", model, *args, "--cache-type-k", "q4_0", stdin=b"one\ntwo\n")
    assert (result.code, result.err) == (0, "")
    assert result.out.count("\n") >= 2


@pytest.mark.parametrize("command", ["generate", "bench", "perplexity", "compare"])
def test_verbose_tells_how_keys_and_values_are_stored(mlxrun_cli, model, tmp_path, command):
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f g h " * 20)
    types = ("--cache-type-k", "q8/32", "--cache-type-v", "f16")
    of_a = ("--a-cache-type-k", "q8/32", "--a-cache-type-v", "f16")
    arguments = {
        "generate": (model, "-p", "a", "-n", "1", *types),
        "bench": (model, "-p", "0", "-n", "1", "-r", "1", *types),
        "perplexity": (model, text, "--context", "32", *types),
        "compare": (model, model, text, "--context", "32", *of_a),
    }
    result = mlxrun_cli(command, *arguments[command], "-v")
    assert result.code == 0, result.err
    assert "cache: keys in q8/32, values in f16" in result.err


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_wrong_names_are_one_line_before_anything_is_loaded(mlxrun_cli, command):
    result = mlxrun_cli(command, "absent.gguf", "--cache-type-v", "q9")
    assert result.code == 2
    assert "must be one of f32, f16, bf16, q8" in result.err.splitlines()[-1]


def test_what_does_not_fit_is_one_line(mlxrun_cli, model):
    args = ("generate", model, "-p", "a", "--cache-type-k")
    assert "divide neither the heads" in mlxrun_cli(*args, "q4/64").error
    wrong = mlxrun_cli("generate", model, "-p", "a", "--cache-type-v", "q4c")
    assert wrong.code == 2  # before anything is loaded
    assert "without c, which is for keys" in wrong.err
    windowed = mlxrun_cli("chat", model, "--window", "9", "--cache-type-k", "q4c", stdin=b"a\n")
    assert "cannot evict old tokens" in windowed.error


def test_a_session_has_its_types_already(llm):
    session = llm.session()
    with pytest.raises(ParameterError, match="session must be left out"):
        llm.stream("a", session=session, **TYPES)
    with pytest.raises(CacheError, match="cannot evict"):
        llm.session(window=9, cache_type_k="q4c")


def test_a_conversation_goes_back_in_a_quantized_cache(llm):
    options = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
    for types in (TYPES, {"cache_type_k": "q3c/32"}):
        session = llm.session(**types)
        for prompt in ([*range(1, 90)], [*range(1, 80), 7, 7]):
            again = llm.generate(prompt, session=session, **options)
            assert again.tokens == llm.generate(prompt, **options, **types).tokens
        assert again.usage.cached_tokens == 79


def test_inspect_predicts_what_a_token_takes(mlxrun_cli, model, llm: mlxrun.LLM):
    facts = inspect_model(model, context=200)
    assert [each["type"] for each in facts["cache_types"]] == [*NAMES, *PER_CHANNEL]
    for each in facts["cache_types"]:
        if each["values"] is None:
            continue
        session = llm.session(cache_type_k=each["type"], cache_type_v=each["type"])
        llm.generate([1] * 9, max_tokens=2, session=session, ignore_eos=True)
        slots = session.cache[0].state[0].shape[2]
        assert session.nbytes == slots * (each["keys"] + each["values"])
        assert each["context"] == 200 * (each["keys"] + each["values"])
    rows = [line.split() for line in mlxrun_cli("inspect", model, "-v").out.splitlines()]
    assert ["q8", "80", "80", "10", "41", "kB"] in rows
    assert ["q4c", "40", "-", "5", "-"] in rows


@pytest.mark.parametrize("types", [TYPES, {"cache_type_k": "q3c/32", "cache_type_v": "mxfp8"}])
def test_a_batch_gives_what_each_gets_alone(llm, types):
    prompts = [[*range(first, first + length)] for first, length in ((3, 5), (9, 120), (30, 70))]
    options = {"temperature": 0, "max_tokens": 50, "ignore_eos": True, **types}
    alone = [llm.generate(prompt, **options).tokens for prompt in prompts]
    for parallel in (2, 3):  # the second time, prefixes are cached
        together = llm.batch(prompts, parallel=parallel, deterministic=True, **options)
        assert [completion.tokens for completion in together] == alone
    # In one pass rounding may move a number to the next code, so not for long.
    together = llm.batch(prompts, **options)
    assert [completion.tokens[:10] for completion in together] == [own[:10] for own in alone]
    with llm.engine(**types) as engine, pytest.raises(ParameterError, match="cache_type_k"):
        assert engine.waiting == 0
        llm.engine(cache_type_k="q9")
