"""A conversation without a terminal: the cache is reused, nothing is lost, files are checked."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
from pathlib import Path

import pytest

from mlxrun.cli import conversation as chats
from mlxrun.cli.conversation import STOPPED, Conversation, ConversationError
from mlxrun.errors import CacheError, ContextLengthError, ParameterError, TemplateError


@pytest.fixture
def chat(llm):
    letters = {token: -float("inf") for token in range(259)}  # neither marks nor bytes
    settings = {"max_tokens": 8, "seed": 1, "logit_bias": letters}
    return Conversation(llm, llm.session(), settings=settings)


def ask(chat: Conversation, text: str, **options) -> str:
    return text_of(chat.ask(text, **options))


def text_of(answer) -> str:
    return "".join(text for text, _ in answer)


def stop_after(chunks: int):
    """A ``stopped`` that says so when it is asked for that many times."""
    asked = iter([False] * (chunks - 1))
    return lambda: next(asked, True)


def fresh_answer(chat: Conversation, seed: int = 1) -> str:
    """The answer of an empty session to the same tokens."""
    options = chat.settings | {"seed": seed}
    return chat.llm.generate(chat.prompt(), session=chat.llm.session(), **options).text


def test_each_turn_computes_only_what_is_new(chat):
    ask(chat, "one")
    for text in ("two", "three", "four"):
        cached = len(chat.session.tokens)
        ask(chat, text)
        assert chat.usage.cached_tokens == cached


def test_cached_tokens_change_nothing(chat):
    ask(chat, "one")
    ask(chat, "two")
    answer = chat.messages.pop()
    assert fresh_answer(chat) == answer["content"]


def test_the_cache_after_undo_retry_and_stop(chat):
    ask(chat, "one")
    ask(chat, "two")
    assert chat.undo() == "two"
    ask(chat, "other")
    assert chat.usage.cached_tokens > 0
    text_of(chat.retry(seed=5))
    assert chat.usage.cached_tokens == chat.usage.prompt_tokens - 1
    assert [m["content"] for m in chat.messages[::2]] == ["one", "other"]
    ask(chat, "stop", stopped=stop_after(3))
    cached = len(chat.session.tokens)
    ask(chat, "go on")
    assert chat.usage.cached_tokens == cached
    answer = chat.messages.pop()
    assert fresh_answer(chat) == answer["content"]


def test_an_undone_exchange_is_not_saved(chat, tmp_path):
    ask(chat, "one")
    first = list(chat.session.tokens)
    ask(chat, "something to be undone")
    chat.undo()
    chats.save_chat(chat, tmp_path / "chat.json", lambda _: None)
    cached = chat.llm.load_session(chats.cache_path(tmp_path / "chat.json")).tokens
    assert cached[: len(first)] == first
    assert "some" not in chat.llm.tokenizer.decode(cached)
    chat.undo()
    chats.save_chat(chat, tmp_path / "chat.json", lambda _: None)
    assert not chat.session.tokens


def test_a_stopped_answer_is_kept_and_marked(chat):
    shown = ask(chat, "one", stopped=stop_after(3))
    assert shown
    assert chat.messages[-1] == {"role": "assistant", "content": shown, STOPPED: True}
    assert chat.finish_reason == "cancelled" and chat.usage is None
    assert all(set(message) == {"role", "content"} for message in chat.template_messages())


def test_a_closed_iterator_stops_the_answer(chat):
    answer = chat.ask("one")
    first, _ = next(answer)
    answer.close()
    assert chat.messages[-1] == {"role": "assistant", "content": first, STOPPED: True}


def test_interrupted_between_layers(chat):
    """The cache is not to be trusted then, and is dropped."""
    ask(chat, "one")

    class Interrupting:
        def __call__(self, *args, **kwargs):
            raise KeyboardInterrupt

    model, chat.llm = chat.llm, Interrupting()
    chat.llm.tokenizer, chat.llm.stream = model.tokenizer, Interrupting()
    with pytest.raises(KeyboardInterrupt):
        ask(chat, "two")
    assert chat.session.tokens == [] and len(chat.messages) == 2
    chat.llm = model
    ask(chat, "three")
    answer = chat.messages.pop()
    assert fresh_answer(chat) == answer["content"]


def test_stopped_during_a_long_prefill(llm, monkeypatch):
    monkeypatch.setattr("mlxrun.engine.prefix_reuse.PREFILL_CHUNK", 32)
    chat = Conversation(llm, llm.session())
    assert ask(chat, "x" * 150, stopped=stop_after(2)) == ""
    assert chat.messages == [] and chat.finish_reason == "cancelled"
    cached = len(chat.session.tokens)
    assert cached == 32
    ask(chat, "x" * 150)
    assert chat.usage.cached_tokens == cached


def test_a_full_context_takes_the_message_back(chat):
    ask(chat, "one")
    with pytest.raises(ContextLengthError, match="holds 256"):
        ask(chat, "x" * 300)
    assert len(chat.messages) == 2
    ask(chat, "two")
    assert len(chat.messages) == 4


def test_a_window_never_fills(llm):
    session = llm.session(window=48, keep=8)
    chat = Conversation(llm, session, settings={"max_tokens": 8})
    for turn in range(12):
        ask(chat, f"message {turn}")
    assert chat.usage.prompt_tokens > llm.context_length
    assert session.cache[0].state[0].shape[2] <= 48 + 8 + 16  # and slots for a rollback


def test_a_template_that_refuses_takes_the_message_back(chat, monkeypatch):
    def refuse(messages):
        raise TemplateError("no")

    monkeypatch.setattr(chat.llm.tokenizer, "encode_chat", refuse)
    with pytest.raises(TemplateError):
        ask(chat, "one")
    assert chat.messages == []


def test_retry_that_fails_keeps_the_old_exchange(chat):
    ask(chat, "one")
    before = list(chat.messages)
    with pytest.raises(ParameterError):
        list(chat.retry(temperature=-1))
    assert chat.messages == before


def test_nothing_to_take_back(chat):
    with pytest.raises(ConversationError, match="nothing to take back"):
        chat.undo()
    with pytest.raises(ConversationError, match="nothing to take back"):
        list(chat.retry())


def test_clear_keeps_system_and_settings(chat):
    chat.system = "be"
    ask(chat, "one")
    chat.clear()
    assert chat.messages == [] and chat.session.tokens == []
    assert chat.system == "be" and chat.settings["seed"] == 1


def test_save_and_load(chat, llm, tmp_path):
    chat.system = "be"
    chat.settings |= {"stop": ("\n", "ü"), "logit_bias": {3: -float("inf")}, "top_k": 7}
    ask(chat, "one ☃")
    ask(chat, "two", stopped=stop_after(2))
    chat.save(tmp_path / "chat.json")
    chat.save(tmp_path / "chat.json")  # over itself
    other = Conversation(llm, llm.session())
    other.load(tmp_path / "chat.json")
    assert (other.system, other.settings) == (chat.system, chat.settings)
    assert other.messages == chat.messages
    assert [path.name for path in tmp_path.iterdir()] == ["chat.json"]


def test_half_characters_are_saved_as_replacements(chat, tmp_path):
    """As a terminal gives bytes that are not UTF-8."""
    ask(chat, "na\udcefve")
    chat.save(tmp_path / "chat.json")
    chat.load(tmp_path / "chat.json")
    assert chat.messages[0]["content"] == "na\ufffdve"


def stored(**changes) -> str:
    return json.dumps({"format": "mlxrun-chat", "version": 1, "messages": []} | changes)


USER, ANSWER = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no saved conversation"),
        ('{"format": "mlxrun-chat", "ver', "no saved conversation"),
        ("[" * 100_000, "no saved conversation"),
        ("[]", "no saved conversation"),
        ('{"messages": []}', "no saved conversation"),
        (stored(version=2), "newer mlxrun"),
        (json.dumps({"format": "mlxrun-chat", "messages": []}), "damaged: it has no version"),
        (stored(version="1"), "damaged: it has no version"),
        (stored(messages=None), "its messages"),
        (stored(messages=[1]), "its messages"),
        (stored(messages=[USER, {"role": "assistant", "content": 1}]), "its messages"),
        (stored(messages=[USER]), "take turns"),
        (stored(messages=[ANSWER, USER]), "take turns"),
        (stored(system=1), "system message"),
        (stored(settings=[]), "settings"),
        (stored(settings={"top_k": -1}), "top_k must be"),
        (stored(settings={"unknown": 1}), "a setting must be"),
    ],
)
def test_damaged_files_change_nothing(chat, tmp_path, text, message):
    ask(chat, "one")
    before = list(chat.messages), dict(chat.settings)
    (tmp_path / "chat.json").write_text(text)
    with pytest.raises((ConversationError, ParameterError), match=message) as caught:
        chat.load(tmp_path / "chat.json")
    assert "\n" not in str(caught.value)
    assert (chat.messages, chat.settings) == before


def test_a_byte_order_mark_is_no_part_of_a_file(chat, tmp_path):
    """As editors on Windows leave one."""
    (tmp_path / "chat.json").write_text(stored(messages=[USER, ANSWER]), encoding="utf-8-sig")
    chat.load(tmp_path / "chat.json")
    assert chat.messages == [USER, ANSWER]


def test_another_conversation_is_replaced_only_by_force(chat, llm, tmp_path):
    file = tmp_path / "chat.json"
    other = Conversation(llm, llm.session())
    other.save(file)
    before = file.read_bytes()
    ask(chat, "one")
    with pytest.raises(ConversationError, match=r"was not replaced.*another conversation.*/save!"):
        chats.save_chat(chat, file, lambda _: None)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]
    chats.save_chat(chat, file, lambda _: None, force=True)
    ask(chat, "two")
    chat.save(file)
    with pytest.raises(ConversationError, match="another conversation"):
        other.save(file)  # it has changed since
    other.load(file)
    other.save(file)
    with pytest.raises(ConversationError, match="another conversation"):
        chat.save(file)


def load_chat(conversation: Conversation, path: Path, say) -> None:
    chats.load_messages(conversation, path, say)
    chats.load_cache(conversation, path, say)


def said(file: Path) -> list[str]:
    """What the user says in a saved conversation."""
    return [m["content"] for m in json.loads(file.read_text())["messages"][::2]]


def test_after_loading_only_the_loaded_file_holds_the_conversation(chat, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    ask(chat, "one")
    chats.save_chat(chat, a, lambda _: None)
    chat.clear()
    ask(chat, "two")
    chats.save_chat(chat, b, lambda _: None)
    load_chat(chat, a, lambda _: None)
    load_chat(chat, b, lambda _: None)
    with pytest.raises(ConversationError, match="another conversation"):
        chats.save_chat(chat, a, lambda _: None)
    with pytest.raises(ConversationError, match=r"another conversation.*written to .*a-\w+\.json"):
        chats.save_at_exit(chat, a, lambda _: None)
    ask(chat, "three")
    chats.save_chat(chat, b, lambda _: None)
    assert (said(a), said(b)) == (["one"], ["two", "three"])


def test_after_clearing_no_file_holds_the_conversation(chat, tmp_path):
    file, heard = tmp_path / "a.json", []
    ask(chat, "one")
    chats.save_chat(chat, file, heard.append)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    chat.clear()
    chats.save_at_exit(chat, file, heard.append)
    assert "nothing to save" in heard[-1] and "another conversation" in heard[-1]
    ask(chat, "two")
    with pytest.raises(ConversationError, match="another conversation"):
        chats.save_chat(chat, file, heard.append)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_no_cache_of_another_conversation_is_saved(chat, tmp_path):
    file = tmp_path / "a.json"
    chats.save_chat(chat, file, lambda _: None)
    ask(chat, "one")
    chats.save_chat(chat, file, lambda _: None)
    assert chats.cache_path(file).exists()
    chat.clear()
    chats.save_chat(chat, file, lambda _: None, force=True)
    assert said(file) == [] and list(tmp_path.iterdir()) == [file]
    ask(chat, "two")
    load_chat(chat, file, lambda _: None)
    chats.save_chat(chat, file, lambda _: None)
    assert list(tmp_path.iterdir()) == [file]


def test_a_cache_that_cannot_be_removed_is_named(chat, tmp_path, monkeypatch):
    file, heard = tmp_path / "a.json", []
    ask(chat, "one")
    chats.save_chat(chat, file, heard.append)
    chat.clear()

    def busy(self, missing_ok=False):
        raise OSError(16, "busy")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", busy)
        chats.save_chat(chat, file, heard.append, force=True)
    assert heard[-1] == f"{file}.cache still has the earlier conversation: busy"


def test_a_cache_does_not_replace_another_file(chat, tmp_path):
    ask(chat, "one")
    notes = tmp_path / "notes.cache"
    notes.write_text("precious")
    with pytest.raises(CacheError, match=r"notes\.cache was not replaced: it is no saved session"):
        chats.save_chat(chat, tmp_path / "notes", lambda _: None)
    assert notes.read_text() == "precious" and list(tmp_path.iterdir()) == [notes]
    with pytest.raises(CacheError, match="was not replaced"):
        chats.check_target(tmp_path / "notes", None)


def test_a_chat_is_saved_elsewhere_if_its_file_cannot_be_written(chat, tmp_path, monkeypatch):
    ask(chat, "one")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    with pytest.raises(
        ConversationError, match=r"not saved: cannot write .*gone/chat\.json"
    ) as found:
        chats.save_at_exit(chat, tmp_path / "gone" / "chat.json", lambda _: None)
    (spare,) = (tmp_path / "home").iterdir()
    assert f"It was written to {spare} instead" in str(found.value)
    before = list(chat.messages)
    chat.clear()
    chat.load(spare)
    assert chat.messages == before


def test_a_chat_that_can_be_saved_nowhere(chat, tmp_path, monkeypatch):
    ask(chat, "one")

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ConversationError, match=r"No space left on device. Nor could it"):
        chats.save_at_exit(chat, tmp_path / "chat.json", lambda _: None)


@pytest.mark.parametrize("what", ["pipe", "socket", "device", "directory"])
def test_files_that_are_not_regular_are_left_alone(chat, llm, tmp_path, what):
    path = made(tmp_path / "x", what)
    before = path.stat()
    ask(chat, "one")
    for attempt in (
        lambda: chat.save(path),
        lambda: chats.check_target(path, path),
        lambda: chat.load(path),
        lambda: chat.session.save(path),
    ):
        with pytest.raises(
            (ConversationError, CacheError), match=f"cannot (read|write) {path}: it is a"
        ):
            attempt()
    assert path.stat().st_ino == before.st_ino and list(tmp_path.iterdir()) == [path]


def made(path: Path, what: str) -> Path:
    """Something other than a regular file."""
    if what == "pipe":
        os.mkfifo(path)
    elif what == "directory":
        path.mkdir()
    elif what == "socket":
        with socket.socket(socket.AF_UNIX) as bound, contextlib.chdir(path.parent):
            bound.bind(path.name)  # a path may be too long for a socket
    else:
        try:
            os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))  # as /dev/null is
        except PermissionError:
            pytest.skip("only root may make a device")
    return path


def test_other_files_are_not_replaced(chat, tmp_path):
    (tmp_path / "precious.txt").write_text("precious")
    with pytest.raises(ConversationError, match="not replaced") as caught:
        chat.save(tmp_path / "precious.txt")
    assert caught.value.message == (
        f"{tmp_path}/precious.txt was not replaced: it is no saved conversation"
    )
    assert (tmp_path / "precious.txt").read_text() == "precious"


def test_a_large_file_is_not_read(chat, tmp_path, monkeypatch):
    """As a model's is, given by mistake."""
    file = tmp_path / "model.gguf"
    file.touch()
    os.truncate(file, 1 << 40)  # of no blocks
    with pytest.raises(ConversationError, match=r"not replaced: it is no saved.*too large"):
        chat.save(file)
    with pytest.raises(ConversationError, match=r"model\.gguf is no saved.*too large"):
        chat.load(file)


def test_a_save_that_fails_leaves_the_old_file(chat, tmp_path, monkeypatch):
    ask(chat, "one")
    chat.save(tmp_path / "chat.json")
    before = (tmp_path / "chat.json").read_bytes()
    ask(chat, "two")

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ConversationError, match=r"cannot write .*: No space left on device"):
        chat.save(tmp_path / "chat.json")
    assert (tmp_path / "chat.json").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_no_such_folder(chat, tmp_path):
    with pytest.raises(ConversationError, match="cannot write"):
        chat.save(tmp_path / "no" / "chat.json")
    with pytest.raises(ConversationError, match="cannot read"):
        chat.load(tmp_path / "no" / "chat.json")
