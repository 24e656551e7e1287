"""A typed chat, with a script in place of the line editor."""

from __future__ import annotations

import os
import re
import signal

import pytest

from mlxrun.cli import terminal as slash
from mlxrun.cli.conversation import STOPPED, Conversation
from mlxrun.cli.terminal import TerminalChat, catching_interrupt


@pytest.fixture
def talk(llm, capsys):
    """Types lines (or raises exceptions among them); gives the chat and what was printed."""
    settings = {"max_tokens": 6, "seed": 1}
    llm.prefix_cache.clear()  # of what other tests have left
    conversation = Conversation(llm, llm.session(), settings=settings)

    def run(*lines: str | type[BaseException]) -> tuple[TerminalChat, str]:
        script = iter(lines)

        def read() -> str:
            line = next(script, EOFError)
            if isinstance(line, str):
                return line
            raise line

        chat = TerminalChat(conversation, read)
        chat.run()
        shown = capsys.readouterr()
        return chat, shown.out + shown.err

    return run


def users(chat: TerminalChat) -> list[str]:
    return [m["content"] for m in chat.conversation.messages if m["role"] == "user"]


def test_messages_and_answers(talk):
    chat, shown = talk("one", "", "  ", "two\nlines")
    assert users(chat) == ["one", "two\nlines"]
    assert "[cut off: max_tokens is 6; /set max_tokens N allows more]" in shown


@pytest.mark.parametrize("leave", ["/exit", "/quit", EOFError])
def test_leaving(talk, leave):
    chat, _ = talk("one", leave, "never said")
    assert users(chat) == ["one"]


def test_interrupts_never_leave(talk):
    chat, shown = talk(KeyboardInterrupt, "one", KeyboardInterrupt, KeyboardInterrupt, "two")
    assert users(chat) == ["one", "two"]
    assert shown.count("(Ctrl-D leaves)") == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/usr/bin/env: no such file", "/usr/bin/env: no such file"),
        ("/etc/passwd", "/etc/passwd"),
        ("/2 of it", "/2 of it"),
        ("/tmp is full", "/tmp is full"),
        (" /help", " /help"),
        ('"""/help"""', "/help"),
        ('"""/etc/passwd is what?"""', "/etc/passwd is what?"),
    ],
)
def test_a_message_may_begin_with_a_slash(talk, line, message):
    chat, shown = talk(line)
    assert users(chat) == [message] and "error" not in shown


def test_a_misspelt_command_is_no_message(talk):
    chat, shown = talk("/sav notes", "/xyzzy", "/HELP")
    assert users(chat) == []
    assert shown.count("To send it as a message, begin with a space") == 2
    assert 'A message that begins with a space or is in """ is never a command' in shown


def test_help_names_every_command(talk):
    _, shown = talk("/help")
    assert all(
        command.usage in shown and command.help in shown for command in slash.COMMANDS.values()
    )


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("/stat", "there is no command /stat. Did you mean /stats? To send it as a message,"),
        ("/xyzzy", "there is no command /xyzzy. /help lists all. To send it as a message,"),
        ("/set logit_bias 99999999=3", "logit_bias must be "),
        ("/set think maybe", "think must be show or hide, not 'maybe'"),
        ("/set temprature 1", "there is no setting temprature. Did you mean temperature?"),
        ("/set temperature 200", "temperature must be a number between 0 and 100, not 200"),
        ("/set top_k many", "top_k must be a whole number between 0 and 2147483647, not 'many'"),
        ("/set top_k 1 2", "top_k must be one value, not '1 2'"),
        ("/set mirostat 1", "mirostat must be 0 (off) or 2, not 1"),
        ('/set stop "open', "stop: no closing quotation"),
        ("/save", "no file is named. Write its name after the command."),
        ("/load /no/such/file", "cannot read /no/such/file: No such file or directory"),
        ("/undo", "there is nothing to take back"),
        ("/retry", "there is nothing to take back"),
    ],
)
def test_mistakes_are_one_line(talk, line, answer):
    _, shown = talk(line)
    (said,) = shown.splitlines()
    assert said.startswith(f"error: {answer}")


def test_set(talk):
    chat, shown = talk(
        "/set temperature 0.5", "/set top-k = 7", '/set stop "\\n" "a b"', "/set seed none",
        "/set logit_bias 5=-inf 7=2", "/set top_p", "/set min_p=0.1",
    )  # fmt: skip
    settings = chat.conversation.settings
    assert settings["temperature"] == 0.5 and settings["top_k"] == 7
    assert settings["stop"] == ("\n", "a b") and settings["seed"] is None
    assert settings["logit_bias"] == {5: -float("inf"), 7: 2}
    assert settings["min_p"] == 0.1
    assert "top_p: 0.95  (" in shown


def test_set_alone_shows_what_set_takes(talk):
    chat, shown = talk("/set stop '\\n' x", "/set")
    before = dict(chat.conversation.settings)
    lines = [line for line in shown.splitlines() if ":" not in line.split()[0]]
    assert len(lines) == len(before) + 1  # and think
    again, _ = talk(*(f"/set {line}" for line in lines))
    assert again.conversation.settings == before


def test_set_can_empty_lists(talk):
    chat, _ = talk("/set stop a b", "/set stop none")
    assert chat.conversation.settings["stop"] == ()


def test_set_back_to_the_defaults(talk):
    chat, _ = talk("/set top_k 7", "/set temperature 0", "/set think hide", "/set top_k default")
    assert chat.conversation.settings["top_k"] == chat.conversation.defaults["top_k"] != 7
    assert chat.conversation.settings["temperature"] == 0 and chat.think == "hide"
    chat, _ = talk("/set think hide", "/set reset")
    assert chat.conversation.settings == chat.conversation.defaults
    assert chat.think == "show"


def test_a_value_that_the_model_cannot_have_changes_nothing(talk):
    chat, _ = talk("/set logit_bias 99999999=3", "one")
    assert users(chat) == ["one"] and chat.conversation.settings["logit_bias"] == {}


def test_system(talk):
    chat, shown = talk("/system Be brief.", "/system", "one")
    assert shown.count("system: Be brief.") == 2
    assert chat.conversation.template_messages()[0] == {"role": "system", "content": "Be brief."}
    chat, _ = talk("/system none")
    assert chat.conversation.system is None


def test_undo_retry_clear(talk):
    chat, shown = talk("one", "two", "/undo", "three", "/retry")
    assert users(chat) == ["one", "three"]
    assert "removed: two" in shown
    chat, shown = talk("/clear")
    assert users(chat) == [] and "a new conversation" in shown


def test_retry_takes_another_seed_and_says_when_that_is_no_use(talk):
    chat, _ = talk("/set temperature 2", "/set top_k 0", "/set min_p 0", "one")
    first = chat.conversation.messages[-1]["content"]
    chat, shown = talk("/retry")
    assert chat.conversation.messages[-1]["content"] != first
    assert chat.conversation.settings["seed"] == 1
    _, shown = talk("/set temperature 0", "/retry")
    assert "temperature is 0: the answer stays the same" in shown
    _, shown = talk("/set temperature 0", "/clear", "/retry")
    assert "there is nothing to take back" in shown and "stays the same" not in shown


def test_stats(talk):
    chat, shown = talk("/stats", "one", "two", "/stats", "three")
    costs = re.findall(r"prompt \d+ tokens(?: \((\d+) cached\))?.*, context \d+/256", shown)
    assert len(costs) == 2
    assert costs[0] == "" and int(costs[1]) > 0
    assert re.search(
        r"prefix cache: [\d.]+ k?B of [\d.]+ [MG]B, \d+ hits, \d+ tokens reused", shown
    )
    assert not chat.stats


def test_save_and_load(talk, tmp_path):
    file = tmp_path / "my chat.json"
    _, shown = talk("one", f"/save {file}", "/clear", f"/load {file}")
    assert f"saved 2 messages to {file}" in shown and f"loaded 2 messages from {file}" in shown
    assert "> one\n" in shown  # the transcript
    chat, shown = talk("/stats", "two")
    assert users(chat) == ["one", "two"]
    cached = re.search(r"\((\d+) cached\)", shown)
    assert cached and int(cached[1]) > 0


def test_save_over_another_conversation(talk, tmp_path):
    file = tmp_path / "chat.json"
    file.write_text('{"format": "mlxrun-chat", "version": 1, "messages": []}')
    _, shown = talk("one", f"/save {file}")
    assert "was not replaced: it holds another conversation" in shown and "/save!" in shown
    _, shown = talk(f"/save! {file}", f"/save {file}")
    assert shown.count(f"saved 2 messages to {file}") == 2


def test_a_saved_chat_without_a_usable_cache(talk, tmp_path):
    file = tmp_path / "chat.json"
    _, shown = talk("one", f"/save {file}")
    cache = tmp_path / "chat.json.cache"
    assert re.search(rf"KV cache of \d+ tokens, [\d.]+ kB, to {re.escape(str(cache))}", shown)
    cache.write_bytes(cache.read_bytes()[:-1] + b"?")
    chat, shown = talk("/clear", f"/load {file}")
    assert f"{cache} is damaged" in shown and users(chat) == ["one"]
    cache.unlink()
    _, shown = talk("/clear", f"/load {file}")
    assert "damaged" not in shown


def test_full_context_is_one_line(talk):
    chat, shown = talk("x" * 400, "one")
    (error,) = [line for line in shown.splitlines() if line.startswith("error: the prompt has ")]
    assert "/clear starts anew" in error
    assert users(chat) == ["one"]


def test_answer_up_to_a_full_context(talk):
    chat, shown = talk("/set max_tokens none", "/set logit_bias 2=-inf", "one")
    assert "[cut off: the context is full. /undo" in shown
    assert len(chat.conversation.messages) == 2


def test_interrupt_stops_the_answer_and_keeps_the_session(talk, monkeypatch):
    """A real signal, sent from where the answer is printed."""
    import mlxrun.cli.terminal as terminal

    def interrupting(text: str) -> str:
        os.kill(os.getpid(), signal.SIGINT)
        return text

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(terminal, "visible", _once(interrupting))
        chat, shown = talk("one")
    assert chat.conversation.messages[-1][STOPPED]
    assert "[stopped]" in shown
    assert signal.getsignal(signal.SIGINT) is before
    chat, _ = talk("two")
    assert users(chat) == ["one", "two"] and STOPPED not in chat.conversation.messages[-1]


def _once(function):
    calls = iter([function])
    return lambda text: next(calls, str)(text)


def test_a_second_interrupt_is_one():
    with catching_interrupt() as stopped:
        assert not stopped()
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_escape_sequences_of_an_answer_are_neutralized(talk):
    banned = " ".join(f"{i}=-inf" for i in range(3))
    _, shown = talk(f"/set logit_bias 30=1000 {banned}", "/set max_tokens 2", "one")
    assert "␛␛" in shown and "\x1b" not in shown


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "x" * 300, "a\0b"])
@pytest.mark.parametrize("command", ["/save", "/load"])
def test_an_odd_path_does_not_end_a_chat(talk, command, name):
    chat, shown = talk("one", f"{command} {name}", "two")
    assert users(chat) == ["one", "two"]
    assert "error: " in shown
