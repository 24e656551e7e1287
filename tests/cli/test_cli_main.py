"""The entry point: what it imports, how it ends, and that the page in docs/ is up to date."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from patience import PATIENCE

from mlxrun import __version__
from mlxrun.cli import main, pull, reference

HEAVY = ("mlx", "numpy", "rich", "prompt_toolkit", "jinja2", "tokenizers", "huggingface_hub")


def python(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.parametrize(
    "args", [["--help"], ["--version"], ["chat", "--help"], ["generate", "-h"]]
)
def test_help_imports_nothing_heavy(args):
    done = python(
        "import sys; from mlxrun.cli.main import run; code = run(sys.argv[1:]);"
        f"print(code, sorted({set(HEAVY)} & set(sys.modules)))",
        *args,
    )
    assert done.stdout.splitlines()[-1] == "0 []"


def test_an_interrupt_while_it_is_imported():
    """Ctrl-C in the first moments: no traceback of whatever module was just being read."""
    done = python(
        "import sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'click': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "from mlxrun.__main__ import main\n"
        "main()\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_version(mlxrun_cli):
    assert mlxrun_cli("--version").out == f"mlxrun {__version__}\n"


def test_python_m_mlxrun():
    command = [sys.executable, "-m", "mlxrun", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (0, f"mlxrun {__version__}\n")


@pytest.mark.parametrize("name", main.COMMANDS)
def test_listed_help_is_the_first_line_of_the_command(name):
    command = main.cli.get_command(click.Context(main.cli), name)
    assert command is not None and command.help is not None
    assert command.help.splitlines()[0] == main.COMMANDS[name]


def test_help_lists_every_command_with_an_example(mlxrun_cli):
    shown = mlxrun_cli("--help").out
    for name, line in main.COMMANDS.items():
        assert f"{name} " in shown and line in shown
        assert f"mlxrun {name} " in mlxrun_cli(name, "--help").out.split("Example")[1]


def test_unknown_command_names_the_nearest(mlxrun_cli):
    result = mlxrun_cli("conver")
    assert result.code == 2
    assert "No such command 'conver'. Did you mean 'convert'?" in result.err


def test_docs_are_up_to_date():
    written = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    # Versions of click break lines differently.
    assert written.split() == reference.render().split()


def test_no_such_model_is_one_line(mlxrun_cli, tmp_path):
    result = mlxrun_cli("generate", tmp_path / "no.gguf", "-p", "x")
    assert result.code == 1 and result.out == ""
    assert result.error.startswith("error: ") and "no.gguf" in result.error


def test_directory_that_is_no_model(mlxrun_cli, tmp_path):
    result = mlxrun_cli("chat", tmp_path)
    assert result.code == 1
    assert "config.json" in result.error


def test_truncated_file(mlxrun_cli, model, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(model.read_bytes()[:-1000])
    for command in (["generate", "-p", "x"], ["inspect"], ["convert"]):
        result = mlxrun_cli(*command, cut)
        assert result.code == 1 and "cut.gguf" in result.error


@pytest.fixture
def broken(monkeypatch):
    """Makes a command raise."""

    def make(error: BaseException) -> None:
        def fail(source: str) -> None:
            raise error

        monkeypatch.setattr(pull.pull_command, "callback", fail)

    return make


def test_unexpected_exception_is_one_line(mlxrun_cli, broken):
    broken(ZeroDivisionError("two\nlines \x1b[31m"))
    result = mlxrun_cli("pull", "a/b")
    assert result.code == 1
    assert result.error == (
        "error: ZeroDivisionError: two lines ␛[31m; run again with MLXRUN_DEBUG=1 for the traceback"
    )


def test_debug_shows_the_traceback(mlxrun_cli, broken, monkeypatch):
    monkeypatch.setenv("MLXRUN_DEBUG", "1")
    broken(ZeroDivisionError("zero"))
    result = mlxrun_cli("pull", "a/b")
    assert result.code == 1
    assert result.err.startswith("Traceback") and "ZeroDivisionError: zero" in result.err


def test_interrupt_is_quiet(mlxrun_cli, broken):
    broken(KeyboardInterrupt())
    result = mlxrun_cli("pull", "a/b")
    assert result.code == 130
    assert result.out + result.err.strip() == ""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_request_to_end_undoes_what_is_half_done(model, tmp_path, name):
    code = f"""
import os, signal, sys
from mlxrun.cli import console, main
signal.signal(signal.{name}, signal.SIG_DFL)  # the tests may run under nohup, which ignores it
console.Bar.__call__ = lambda *_: os.kill(os.getpid(), signal.{name})
main.main(["convert", sys.argv[1], "-o", sys.argv[2]])
"""
    done = python(code, model, tmp_path / "out")
    assert (done.returncode, done.stdout, done.stderr) == (128 + getattr(signal, name), "", "")
    assert list(tmp_path.iterdir()) == []


def test_closed_pipe_is_silent(model):
    code = (
        "import sys; from mlxrun.cli import main, pull\n"
        "def talk(source):\n  while True: print('x' * 1000, flush=True)\n"
        "pull.pull_command.callback = talk; main.main(['pull', 'a/b'])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(5) == b"xxxxx"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(PATIENCE) == main.CLOSED_PIPE


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_closed_streams(closed, model):
    command = f'"{sys.executable}" -m mlxrun generate "{model}" -p hi -n 3 {closed}'
    done = subprocess.run(["sh", "-c", command], capture_output=True, timeout=PATIENCE)
    assert done.returncode == 0
    assert b"rror" not in done.stderr


def test_full_output_device(model):
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "mlxrun", "inspect", str(model)],
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=PATIENCE,
        )
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1 and b"No space left on device: the output" in done.stderr


@pytest.mark.parametrize("name", ["chat", "generate"])
def test_options_stand_under_headings(mlxrun_cli, name):
    shown = mlxrun_cli(name, "--help").out
    parts = {}
    for heading in ("Loading", "KV cache", "Sampling", "Options"):
        shown, found, parts[heading] = shown.rpartition(f"\n{heading}:\n")
        assert found
    assert "--temperature" in parts["Sampling"] and "--cache-type-k" in parts["KV cache"]
    assert "--adapter" in parts["Loading"] and "--system" in parts["Options"]
    assert "--help" in parts["Options"]
