"""``mlxrun chat`` from outside: through a pipe, and on a terminal of its own."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from patience import PATIENCE
from tiny_models import Tiny

import mlxrun
from mlxrun.cli.chat import _shared_prefix
from mlxrun.cli.conversation import Conversation

GREEDY = ["--temp", "0", "-n", "8"]


def answers(llm, *texts: str, **options) -> list[str]:
    """What a conversation gives through the API."""
    messages: list[dict[str, str]] = []
    for text in texts:
        messages.append({"role": "user", "content": text})
        answer = llm.chat(messages, **{"temperature": 0, "max_tokens": 8} | options).text
        messages.append({"role": "assistant", "content": answer})
    return [m["content"] for m in messages[1::2]]


LETTERS = [arg for token in range(259) for arg in ("--logit-bias", f"{token}=-inf")]
BIAS = {token: -float("inf") for token in range(259)}


def test_a_pipe_is_one_conversation(mlxrun_cli, model, llm):
    result = mlxrun_cli("chat", model, *GREEDY, *LETTERS, stdin=b"one\n\ntwo\r\n/stats\nlast")
    assert (result.code, result.err) == (0, "")
    expected = answers(llm, "one", "two", "/stats", "last", logit_bias=BIAS)
    assert result.out == "".join(f"{answer}\n" for answer in expected)


def test_a_pipe_gets_no_control_characters(mlxrun_cli, model):
    result = mlxrun_cli("chat", model, "--temp", "3", "-n", "20", stdin=b"one\ntwo\n")
    assert result.code == 0
    assert not [c for c in result.out if unicodedata.category(c) == "Cc" and c not in "\n\t"]


def test_a_pipe_of_other_bytes_than_text(mlxrun_cli, model):
    result = mlxrun_cli("chat", model, *GREEDY, *LETTERS, stdin=b"one\n\xff\ntwo\n")
    assert result.code == 2
    assert len(result.out.splitlines()) == 1
    assert "Line 2 of standard input is not UTF-8 text: invalid start byte." in result.err


def test_a_pipe_that_fills_the_context(mlxrun_cli, model):
    result = mlxrun_cli("chat", model, *GREEDY, stdin=b"one\n" + b"x" * 300 + b"\ntwo\n")
    assert result.code == 1
    assert len(result.out) > 0 and "chat --window N" in result.error
    assert "/undo" not in result.error  # which a pipe sends as a message


def test_a_window_makes_room(mlxrun_cli, model):
    lines = b"".join(b"message %d\n" % i for i in range(20))
    result = mlxrun_cli("chat", model, *GREEDY, "--window", "64", "--system", "be", stdin=lines)
    assert (result.code, result.err) == (0, "")


@pytest.mark.parametrize(
    ("system", "text"), [(None, "[user]"), ("be brief", "[system]be brief\n[user]")]
)
def test_a_window_keeps_what_precedes_the_messages(llm, system, text):
    conversation = Conversation(llm, llm.session(), system=system)
    keep = _shared_prefix(conversation)
    conversation.messages.append({"role": "user", "content": "x"})
    assert llm.tokenizer.decode(conversation.prompt()[:keep]) == text


def test_interrupt_ends_a_pipe(mlxrun_cli, model, monkeypatch):
    def interrupt(self, text, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "ask", interrupt)
    assert mlxrun_cli("chat", model, stdin=b"one\ntwo\n").code == 130


def test_policy_of_a_converted_model(mlxrun_cli, model, tmp_path):
    assert mlxrun_cli("convert", model, "-o", tmp_path / "out").code == 0
    result = mlxrun_cli("chat", tmp_path / "out", "--policy", "near")
    assert result.code == 2 and "converted already" in result.err


def test_load_then_options_win(mlxrun_cli, model, llm, tmp_path):
    stored = {
        "format": "mlxrun-chat", "version": 1, "system": "be", "settings": {"max_tokens": 3},
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    }  # fmt: skip
    (tmp_path / "chat.json").write_text(json.dumps(stored))
    args = ["chat", model, "--temp", "0", "--load", tmp_path / "chat.json"]
    messages = [{"role": "system", "content": "be"}, *stored["messages"]]
    messages.append({"role": "user", "content": "one"})
    result = mlxrun_cli(*args, stdin=b"one\n")
    three = llm.chat(messages, temperature=0, max_tokens=3).text
    assert result.out.rstrip() == three.rstrip()
    messages[0] = {"role": "system", "content": "other"}
    result = mlxrun_cli(*args, "-n", "5", "--system", "other", stdin=b"one\n")
    assert result.out.rstrip() == llm.chat(messages, temperature=0, max_tokens=5).text.rstrip()


def test_stats_of_a_pipe(mlxrun_cli, model):
    result = mlxrun_cli("chat", model, *GREEDY, *LETTERS, "--stats", stdin=b"one\ntwo\n")
    first, second = result.err.splitlines()
    assert "cached" not in first and "cached)" in second


def test_keep_without_window(mlxrun_cli, model):
    assert mlxrun_cli("chat", model, "--keep", "4").code == 2


def test_no_demo_model(mlxrun_cli, monkeypatch, tmp_path):
    monkeypatch.setattr("mlxrun.cli.chat.PACKAGE", "no_such_package")
    monkeypatch.setattr("mlxrun.cli.chat.DEMO", tmp_path / "demo.gguf")
    result = mlxrun_cli("chat", stdin=b"hello\n")
    assert result.code == 1 and "mlxrun chat MODEL" in result.error


class Terminal:
    """A terminal in which a program runs: type into it, wait for what it shows."""

    def __init__(self, process: subprocess.Popen[bytes], descriptor: int) -> None:
        self.process, self._descriptor = process, descriptor
        self.shown = ""

    def type(self, keys: str) -> None:
        os.write(self._descriptor, keys.encode())

    def echo(self, on: bool) -> None:
        """Have it show what is typed, or not."""
        modes = termios.tcgetattr(self._descriptor)
        modes[3] = modes[3] | termios.ECHO if on else modes[3] & ~termios.ECHO
        termios.tcsetattr(self._descriptor, termios.TCSANOW, modes)

    def echoes(self) -> bool:
        return bool(termios.tcgetattr(self._descriptor)[3] & termios.ECHO)

    def hang_up(self) -> None:
        """Close it, as a window is closed."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def expect(self, pattern: str, timeout: float = PATIENCE) -> str:
        """Wait until the pattern is shown; drops the output before it."""
        until = time.monotonic() + timeout
        while not (match := re.search(pattern, self.shown, re.DOTALL)):
            assert time.monotonic() < until, f"{pattern!r} is not in {self.shown!r}"
            if select.select([self._descriptor], [], [], 0.1)[0]:
                try:
                    data = os.read(self._descriptor, 65536).decode(errors="replace")
                except OSError:  # Linux: the other side is closed
                    data = ""
                assert data, f"ended without {pattern!r}: {self.shown!r}"
                self.shown += re.sub(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[=>]", "", data)
        self.shown = self.shown[match.end() :]
        return match[0]


@contextmanager
def terminal(tmp_path: Path, *args: object, program: str = "mlxrun") -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
    environment = os.environ | {
        "TERM": "xterm",
        "PROMPT_TOOLKIT_NO_CPR": "1",  # no terminal here reports the cursor
        "XDG_STATE_HOME": str(tmp_path / "state"),
    }
    process = subprocess.Popen(
        [*([sys.executable, "-m", program] if program else []), *map(str, args)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        start_new_session=True,
        preexec_fn=_own_terminal,
    )
    os.close(theirs)
    screen = Terminal(process, ours)
    try:
        yield screen
    finally:
        process.kill()
        process.wait()
        screen.hang_up()


def _own_terminal() -> None:
    """Make standard input the controlling terminal, so that Ctrl-C is a signal."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def endless(tmp_path):
    """A model whose answers do not end by themselves before they are stopped, however late."""
    return Tiny(keys={"context_length": 1 << 16}).write(tmp_path / "m.gguf")


def test_a_terminal(endless, tmp_path):
    with terminal(tmp_path, "chat", endless, "--temp", "0", *LETTERS, "--stats") as screen:
        screen.expect("Loading m.gguf")
        screen.expect("/help lists the commands.*>")
        screen.type("/set max_tokens 5\r")
        screen.expect(r"max_tokens: 5\s.*>")
        screen.type("hello\r")
        screen.expect(r"\[cut off: max_tokens is 5")
        screen.expect(r"prompt \d+ tokens.*, context \d+/65536.*>")
        screen.type("/set max_tokens none\r")
        screen.expect(r"max_tokens: none\s.*>")
        screen.type("more\r")
        screen.expect("piece")
        screen.type("\x03")  # while the answer streams
        screen.expect(r"\[stopped\].*>")
        screen.type("half a line\x03other half\x03\x03\x03")
        screen.expect(r"Ctrl-D leaves.*Ctrl-D leaves.*>")
        screen.type("/set max_tokens 4\r")
        screen.expect(r"max_tokens: 4\s.*>")
        screen.type("\x1b[A\x1b[A\r")  # history: the message before
        screen.expect(r"\(\d+ cached\).*>")
        screen.type(f"/save {tmp_path}/chat.json\r")
        screen.expect("saved 6 messages.*>")
        screen.type("\x04")
        assert screen.process.wait(PATIENCE) == 0
    stored = json.loads((tmp_path / "chat.json").read_text())
    assert [m["content"] for m in stored["messages"][::2]] == ["hello", "more", "more"]
    assert stored["messages"][3]["stopped"] is True
    assert "hello" in (tmp_path / "state" / "mlxrun" / "chat_history").read_text()


def test_typing_during_a_completion_waits_for_the_next_prompt(model, tmp_path):
    with terminal(tmp_path, "chat", model, "--temp", "0", *LETTERS) as screen:
        screen.expect("/help lists the commands.*>")
        screen.type("/set max_tokens none\r")
        screen.expect(r"max_tokens: none\s.*>")
        screen.type("hello\r")
        screen.expect(r"hello\s+\w\w")
        screen.type("typed\x1b\rahead")  # Alt-Enter: a message of two lines
        answer = screen.expect(r"\[cut off: the context is full.*>")
        assert "typed" not in answer
        screen.expect("typed.*ahead")
        screen.type("\r")
        screen.expect("error: the prompt has.*>")
        screen.type("\x1b[A")
        screen.expect("typed.*ahead")
        screen.type("\x03\x04")
        assert screen.process.wait(30) == 0


@pytest.mark.parametrize(
    ("most", "before", "after"),
    [
        ("none", r"hello\s+\w\w", r"\nsaved 2 messages"),
        ("2", r"hello\s+\w\w.*>", r"saved 2 messages"),
    ],
    ids=["during a completion", "at the prompt"],
)
def test_a_terminal_that_closes(endless, tmp_path, most, before, after):
    file = tmp_path / "talk.json"
    with terminal(
        tmp_path, "chat", endless, "--temp", "0", *LETTERS, "-n", most, "--save", file
    ) as screen:
        screen.expect("/help lists the commands.*>")
        screen.type("hello\r")
        screen.expect(before)
        screen.process.send_signal(signal.SIGHUP)
        screen.expect(after)
        assert screen.process.wait(30) == 129


def test_typing_waits_after_the_shell_has_been_in_the_foreground(endless, tmp_path):
    """Ctrl-Z and fg: the shell has the terminal echo meanwhile."""
    with terminal(tmp_path, "chat", endless, "--temp", "0", *LETTERS, "-n", "none") as screen:
        screen.expect("/help lists the commands.*>")
        screen.type("hello\r")
        screen.expect(r"hello\s+\w\w")
        screen.process.send_signal(signal.SIGSTOP)
        screen.echo(True)
        assert screen.echoes()
        screen.process.send_signal(signal.SIGCONT)
        until = time.monotonic() + PATIENCE
        while screen.echoes():
            assert time.monotonic() < until


def test_an_interrupt_loses_nothing_that_was_typed_before(endless, tmp_path):
    with terminal(tmp_path, "chat", endless, "--temp", "0", *LETTERS, "-n", "none") as screen:
        screen.expect("/help lists the commands.*>")
        screen.type("hello\r")
        screen.expect(r"hello\s+\w\w")
        screen.type("/set seed 7\r\x03")
        screen.expect(r"\[stopped\].*seed: 7")


def test_a_terminal_that_is_gone(mlxrun_cli, model, tmp_path):
    """Its window was closed: the terminal itself can no longer be set, nor written to."""
    file = tmp_path / "talk.json"
    with terminal(
        tmp_path, "chat", model, "--temp", "0", *LETTERS, "-n", "200", "--save", file
    ) as screen:
        screen.expect("/help lists the commands.*>")
        screen.type("hello\r")
        screen.expect(r"hello\s+\w\w")
        screen.hang_up()
        assert screen.process.wait(PATIENCE) == 129
    assert len(json.loads(file.read_text())["messages"]) == 2


def test_loading_shows_what_was_loaded(mlxrun_cli, model, tmp_path):
    file = tmp_path / "talk.json"
    turn = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    later = [{"role": "user", "content": "last"}, {"role": "assistant", "content": "words"}]
    stored = {"format": "mlxrun-chat", "version": 1, "model": "models/other.gguf"}
    file.write_text(json.dumps(stored | {"messages": turn * 3 + later}))
    with terminal(tmp_path, "chat", model, "--load", file) as screen:
        screen.expect(f"loaded 8 messages from {file}")
        screen.expect(r"saved with models/other.gguf; tiny.gguf continues")
        screen.expect(r"\[4 messages before these\]\s+> one\s+two\s+> last\s+words\s+>")
    piped = mlxrun_cli("chat", model, "--load", file, stdin=b"")
    assert (piped.out, len(piped.err.splitlines())) == ("", 2)


def test_a_chat_typed_into_a_pipe_has_a_prompt(model, tmp_path):
    """As in ``mlxrun chat | tee log``."""
    log = tmp_path / "log"
    shell = 'exec "$0" -m mlxrun chat "$1" -n 8 > "$2"'
    with terminal(tmp_path, *("sh", "-c", shell, sys.executable, model, log), program="") as screen:
        screen.expect(r"Talking with .*Each line is a message, Ctrl-D leaves\.\s+> ")
        screen.type("hello\n")
        screen.expect("> ")
        screen.type("\x04")
        assert screen.process.wait(30) == 0
    assert log.read_text() and "Talking" not in log.read_text()


def test_a_saved_chat_continues_without_another_prefill(mlxrun_cli, model, tmp_path):
    file = tmp_path / "talk.json"
    options = [*GREEDY, *LETTERS, "--stats"]
    whole = mlxrun_cli("chat", model, *options, stdin=b"one\ntwo\nthree\n")
    first = mlxrun_cli("chat", model, *options, "--save", file, stdin=b"one\ntwo\n")
    assert first.code == 0 and f"saved 4 messages to {file}" in first.err
    then = mlxrun_cli("chat", model, *options, "--load", file, "--save", file, stdin=b"three\n")
    assert first.out + then.out == whole.out
    cached = [re.search(r"\((\d+) cached\)", line) for line in whole.err.splitlines()]
    assert f"({cached[-1][1]} cached)" in then.err
    assert "saved 6 messages" in then.err


def test_where_nothing_can_be_saved_nothing_is_said(mlxrun_cli, model, tmp_path):
    result = mlxrun_cli("chat", model, "--save", tmp_path / "gone" / "talk.json", stdin=b"one\n")
    assert (result.code, result.out) == (1, "")
    assert "cannot write" in result.err and "No such file or directory" in result.err
    assert not list(tmp_path.iterdir())


def test_a_chat_is_not_saved_over_something_else(mlxrun_cli, model, tmp_path):
    file = tmp_path / "shopping list"
    file.write_text("tea")
    result = mlxrun_cli("chat", model, "--save", file, stdin=b"one\n")
    assert result.code == 1 and "not replaced" in result.error
    assert file.read_text() == "tea"


def test_another_chat_is_not_saved_over(mlxrun_cli, model, tmp_path):
    file = tmp_path / "talk.json"
    assert mlxrun_cli("chat", model, "--save", file, stdin=b"one\n").code == 0
    before = file.read_bytes()
    result = mlxrun_cli("chat", tmp_path / "gone.gguf", "--save", file, stdin=b"two\n")
    assert (result.code, result.out) == (1, "")  # before a model is looked for
    assert "not replaced: it holds another conversation. Continue it with --load" in result.error
    assert file.read_bytes() == before


def test_a_chat_is_saved_elsewhere_if_its_file_has_become_another(
    mlxrun_cli, model, llm, tmp_path, monkeypatch
):
    """As when two chats end with --save to one file."""
    file, real = tmp_path / "talk.json", mlxrun.LLM.stream

    def stream(self, *arguments, **options):
        Conversation(llm, llm.session()).save(file)
        return real(self, *arguments, **options)

    monkeypatch.setattr(mlxrun.LLM, "stream", stream)
    result = mlxrun_cli("chat", model, "--save", file, stdin=b"mine\n")
    assert result.code == 1 and "was not replaced: it holds another conversation" in result.err
    (spare,) = (path for path in tmp_path.glob("talk-*.json"))
    assert str(spare) in result.err and "mine" in spare.read_text()
    assert json.loads(file.read_text())["messages"] == []
