"""What a shell completes, asked as a shell asks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from mlxrun.cli.main import cli
from mlxrun.kv_cache.options import NAMES


def completed(*words: str) -> list[tuple[str, str]]:
    """(kind, text) of what is offered for the last word."""
    *args, incomplete = words
    found = ShellComplete(cli, {}, "mlxrun", "_MLXRUN_COMPLETE").get_completions(args, incomplete)
    return [(item.type, item.value) for item in found]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with models and other things, and a cache of the hub."""
    for name in ("tiny.gguf", "Large.GGUF", "notes.txt", "sub/deep.gguf", "made/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    hub = tmp_path / "home" / "hub"
    for name in ("models--org--repo-GGUF", "models--org--a--b", "datasets--org--d", ".locks"):
        (hub / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.mark.parametrize("command", ["chat", "generate", "inspect", "convert", "bench"])
def test_models_of_the_folder_and_of_the_cache(folder, command):
    models = ["Large.GGUF", "made", "org/a--b", "org/repo-GGUF", "tiny.gguf"]
    assert completed(command, "") == [("plain", name) for name in models]


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("ti", [("plain", "tiny.gguf")]),
        ("org/r", [("plain", "org/repo-GGUF")]),
        ("sub/", [("plain", "sub/deep.gguf")]),
        ("./t", [("plain", "./tiny.gguf")]),
        ("su", [("file", "su")]),  # the shell continues into folders
        ("no/such/folder/", [("file", "no/such/folder/")]),
        ("a\0b", [("file", "a\0b")]),
    ],
)
def test_what_is_typed_so_far(folder, typed, found):
    assert completed("chat", typed) == found


def test_no_cache_at_all(folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(folder / "nowhere"))
    assert completed("chat", "org") == [("file", "org")]


def test_types_of_caches():
    assert completed("chat", "--cache-type-v", "") == [("plain", name) for name in NAMES]
    assert completed("chat", "--cache-type-v", "q4") == [("plain", "q4")]
    assert completed("chat", "--cache-type-k", "q4") == [("plain", "q4"), ("plain", "q4c")]


def test_bash_is_answered_without_loading_anything_heavy(folder):
    code = (
        "import sys; from mlxrun.cli.main import run; code = run();"
        "print(code, {'mlx', 'numpy', 'rich', 'huggingface_hub'} & set(sys.modules))"
    )
    environment = os.environ | {
        "_MLXRUN_COMPLETE": "bash_complete", "COMP_WORDS": "mlxrun chat ti", "COMP_CWORD": "2",
    }  # fmt: skip
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout.splitlines() == ["plain,tiny.gguf", "0 set()"], done.stderr


@pytest.mark.parametrize(
    "name",
    ["a b.gguf", "$(touch pwned).gguf", "a;b.gguf", "a'b.gguf", "ev\x1b[31mil.gguf", "a\nb.gguf"],
)
def test_a_name_that_a_shell_would_read_otherwise_is_left_to_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).touch()
    assert completed("inspect", "") == [("file", "")]
    (tmp_path / "größe-1.gguf").touch()
    assert completed("inspect", "") == [("plain", "größe-1.gguf")]
