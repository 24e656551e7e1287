"""Wrong arguments to the public names: each is refused in one line, whatever its type."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from patience import PATIENCE
from tiny_models import Tiny

import mlxrun
from mlxrun import LLM, MlxrunError, Session


def shown(value: object) -> str:
    """A test's name for a value, the same in every process."""
    return "object" if type(value) is object else repr(value)


WRONG: list[Any] = [None, 3, -1.5, True, b"x", object(), {1, 2}, int, np.array(3), mx.array(3)]
MESSAGES = [{"role": "user", "content": "a"}]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Tiny(layers=1).write(tmp_path_factory.mktemp("misuse") / "m.gguf")


@pytest.fixture(scope="module")
def llm(path: Path) -> LLM:
    return mlxrun.load(path)


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(MlxrunError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("wrong", WRONG, ids=shown)
def test_sources_and_targets_are_paths(wrong: Any, path: Path, tmp_path: Path) -> None:
    refused(lambda: mlxrun.load(wrong))
    refused(lambda: mlxrun.load_tokenizer(wrong))
    refused(lambda: mlxrun.convert(wrong, tmp_path / "out"))
    if wrong is not None:
        assert "path" in refused(lambda: mlxrun.convert(path, wrong))


def test_a_target_may_be_in_the_home_directory(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    mlxrun.convert(path, "~/out")
    assert (tmp_path / "out" / "config.json").is_file()
    assert "cannot write" in refused(lambda: mlxrun.convert(path, "~no-such-user-at-all/out"))


@pytest.mark.parametrize("name", ["a\0b", "a" * 300])
def test_targets_that_no_file_system_takes(name: str, path: Path, tmp_path: Path) -> None:
    assert "cannot write" in refused(lambda: mlxrun.convert(path, tmp_path / name))


@pytest.mark.parametrize("wrong", [w for w in WRONG if not isinstance(w, set | bytes)], ids=shown)
def test_prompts_are_text_ids_or_messages(wrong: Any, llm: LLM) -> None:
    assert "prompt" in refused(lambda: llm.generate(wrong))
    assert "prompt" in refused(lambda: llm.logits(wrong))


@pytest.mark.parametrize("wrong", [None, 3, True, object(), int], ids=shown)
def test_texts_and_conversations_are_what_they_are(wrong: Any, llm: LLM) -> None:
    tokenizer = llm.tokenizer
    refused(lambda: llm.chat(wrong))
    refused(lambda: tokenizer.encode(wrong))
    refused(lambda: tokenizer.decode(wrong))
    refused(lambda: tokenizer.encode_chat(wrong))


@pytest.mark.parametrize("wrong", [None, 1.5, "1", -1, 288, object(), [1]], ids=shown)
def test_token_ids_are_whole_numbers_of_the_vocabulary(wrong: Any, llm: LLM) -> None:
    refused(lambda: llm.tokenizer.piece(wrong))
    refused(lambda: llm.tokenizer.token_bytes(wrong))
    refused(lambda: llm.tokenizer.is_control(wrong))
    refused(lambda: llm.tokenizer.decode([wrong]))
    refused(lambda: llm.generate([wrong]))


@pytest.mark.parametrize("ids", [np.array([60, 61]), mx.array([60, 61]), (60, 61), range(60, 62)])
def test_ids_of_numpy_and_mlx_are_ids(ids: Any, llm: LLM) -> None:
    tokenizer = llm.tokenizer
    assert tokenizer.decode(ids) == tokenizer.decode([60, 61])
    assert llm.generate(ids, max_tokens=2, temperature=0).tokens == (
        llm.generate([60, 61], max_tokens=2, temperature=0).tokens
    )


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "8", 2**63, mx.array(8), True], ids=shown)
def test_windows_are_whole_numbers(wrong: Any, llm: LLM) -> None:
    assert "window" in refused(lambda: llm.session(window=wrong))


@pytest.mark.parametrize("wrong", [None, -1, 1.5, "8", 2**63], ids=shown)
def test_kept_tokens_are_counted(wrong: Any, llm: LLM) -> None:
    assert "keep" in refused(lambda: llm.session(window=8, keep=wrong))


def test_a_session_belongs_to_its_model(path: Path, llm: LLM) -> None:
    """Another model's keys and values would give wrong text without a word."""
    session = mlxrun.load(path).session()
    assert "session" in refused(lambda: llm.generate("a", session=session))
    assert "session" in refused(lambda: llm.generate("a", session=object()))
    fork = llm.session().fork()
    assert llm.generate("a", session=fork, max_tokens=1, ignore_eos=True).tokens


@pytest.mark.parametrize("wrong", [3, "x", [1], {1: 2}, {"messages": []}], ids=shown)
def test_template_variables_have_names(wrong: Any, llm: LLM) -> None:
    assert "template" in refused(lambda: llm.chat(MESSAGES, template=wrong))


@pytest.mark.parametrize("name", ["self", "cls", "source", "kwargs", "undefined"])
def test_template_variables_may_have_any_other_name(name: str, llm: LLM) -> None:
    plain = llm.chat(MESSAGES, max_tokens=2, temperature=0)
    assert (
        llm.chat(MESSAGES, max_tokens=2, temperature=0, template={name: 1}).tokens == plain.tokens
    )


@pytest.mark.parametrize("wrong", ["float8", 32, ["float32"], {"a": 1}], ids=shown)
def test_choices_are_words(wrong: Any, path: Path, tmp_path: Path, llm: LLM) -> None:
    assert "dtype" in refused(lambda: mlxrun.load(path, dtype=wrong))
    assert "policy" in refused(lambda: mlxrun.convert(path, tmp_path / "m", policy=wrong))
    assert "template" in refused(lambda: llm.tokenizer.encode_chat(MESSAGES, template=wrong))


@pytest.mark.parametrize("wrong", [0, 3, "x", object(), {"a": 1}], ids=shown)
def test_tools_are_listed(wrong: Any, llm: LLM) -> None:
    assert "tools" in refused(lambda: llm.tokenizer.encode_chat(MESSAGES, tools=wrong))


def test_content_without_end_is_refused(llm: LLM) -> None:
    message: dict[str, Any] = {"role": "user"}
    message["content"] = message
    assert "nested" in refused(lambda: llm.chat([message]))


def test_a_session_has_one_stream(llm: LLM) -> None:
    """Two streams that take turns on one session would each continue from the other's tokens."""
    greedy: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
    expected = llm.generate("ab", **greedy).tokens
    session = llm.session()
    first = llm.stream("ab", session=session, **greedy)
    next(first)
    second = llm.stream("ab", session=session, **greedy)
    tokens = list(next(second).tokens)
    assert "session" in refused(lambda: next(first))
    for chunk in second:
        tokens += chunk.tokens
    assert tokens == expected
    assert llm.generate("ab", session=session, **greedy).tokens == expected


def test_a_stream_does_not_continue_from_the_state_of_a_failed_one(llm: LLM) -> None:
    """The other read a part of its prompt into the session that the first had not done with."""
    greedy: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
    prompt = [5, 6, 7] * 200
    expected = llm.generate(prompt[::-1], **greedy).tokens

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    session = llm.session()
    first = llm.stream("ab", session=session, **greedy)
    next(first)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(prompt[::-1], session=session, progress=interrupt, **greedy)
    assert "session" in refused(lambda: list(first))
    assert llm.generate(prompt[::-1], session=session, **greedy).tokens == expected


@pytest.mark.parametrize("back", [lambda session: session.rewind(3), lambda s: s.reset()])
def test_a_stream_does_not_continue_from_a_session_that_was_rewound(
    llm: LLM, back: Callable[[Session], object]
) -> None:
    greedy: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
    expected = llm.generate("abcdef", **greedy).tokens
    session = llm.session()
    stream = llm.stream("abcdef", session=session, **greedy)
    next(stream)
    back(session)
    assert "session" in refused(lambda: list(stream))
    assert llm.generate("abcdef", session=session, **greedy).tokens == expected


def test_a_prompt_is_not_read_on_into_a_session_that_went_back(llm: LLM) -> None:
    greedy: dict[str, Any] = {"max_tokens": 5, "temperature": 0, "ignore_eos": True}
    prompt = [5, 6, 7] * 400
    session = llm.session()

    def back(done: int, total: int) -> None:
        session.rewind(100)

    assert "session" in refused(
        lambda: llm.generate(prompt, session=session, progress=back, **greedy)
    )
    known = llm.generate(prompt, session=llm.session(), **greedy)
    llm.prefix_cache.clear()
    assert known.tokens == llm.generate(prompt, session=llm.session(), **greedy).tokens


def test_threads_may_share_a_model(llm: LLM) -> None:
    greedy: dict[str, Any] = {"max_tokens": 30, "temperature": 0, "ignore_eos": True}
    expected = llm.generate("ab", **greedy).tokens
    with ThreadPoolExecutor(6) as pool:
        completions = [pool.submit(llm.generate, "ab", **greedy) for _ in range(12)]
        logits = pool.submit(llm.logits, [1, 2, 3])
        assert all(completion.result(PATIENCE).tokens == expected for completion in completions)
        assert mx.array_equal(logits.result(PATIENCE), llm.logits([1, 2, 3]))


def test_a_long_wrong_value_is_not_shown_in_full(llm: LLM) -> None:
    assert len(refused(lambda: llm.generate("a", max_tokens="9" * 100_000))) < 300


@pytest.mark.parametrize(
    ("wrong", "near"), [("max_token", "max_tokens"), ("temprature", "temperature"), ("zz", "top_k")]
)
def test_the_error_of_a_misspelt_option_names_the_nearest(wrong: str, near: str, llm: LLM) -> None:
    for call in (llm.generate, lambda prompt, **options: llm.batch([prompt], **options)):
        error = refused(lambda call=call: call("a", **{wrong: 1}))
        assert near in error
        assert repr(wrong) in error


@pytest.mark.parametrize(
    ("wrong", "near"), [("paralel", "parallel"), ("stal", "stall"), ("zz", "deterministic")]
)
def test_the_error_of_a_misspelt_option_of_an_engine_names_the_nearest(
    wrong: str, near: str, llm: LLM
) -> None:
    for call in (llm.engine, llm.room):
        error = refused(lambda call=call: call(**{wrong: 1}))
        assert near in error
        assert repr(wrong) in error


@pytest.mark.parametrize(
    ("wrong", "near"), [("windows", "window"), ("cache_type_q", "cache_type_k"), ("zz", "keep")]
)
def test_the_error_of_a_misspelt_option_of_a_session_names_the_nearest(
    wrong: str, near: str, llm: LLM, tmp_path: Path
) -> None:
    for call in (llm.session, lambda **options: llm.load_session(tmp_path / "x", **options)):
        error = refused(lambda call=call: call(**{wrong: 1}))
        assert near in error
        assert repr(wrong) in error


def test_a_session_shows_its_tokens(llm: LLM) -> None:
    session = llm.session()
    assert repr(session) == "Session(0 tokens)"
    llm.generate([3, 4, 5], max_tokens=1, session=session)
    assert repr(session) == f"Session({len(session.tokens)} tokens)"
    assert repr(llm.session(window=64)) == "Session(0 tokens, with a window)"
