"""Asking llama-bench: a stand-in on the path answers as it does, or fails as it may."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlxrun.bench.baselines import LlamaBenchRuntime
from mlxrun.bench.workloads import Decode, Prefill, Ragged
from mlxrun.errors import BaselineError, ParameterError

ANSWER = {
    "build_commit": "abc123",
    "backends": "CPU",
    "model_type": "llama 1B Q4_K",
    "n_threads": 2,
    "n_prompt": 8,
    "samples_ns": [2_500_000_000],
    "samples_ts": [3.2],
}


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Puts an executable on the path that prints some text, and notes its arguments."""

    def make(text: str, code: int = 0) -> Path:
        binary, asked = tmp_path / "llama-bench", tmp_path / "asked"
        binary.write_text(
            f"#!/bin/sh\necho \"$@\" > {asked}\necho 'ggml: loading' >&2\n"
            f"echo 'no such thing' >&2\ncat <<'END'\n{text}\nEND\nexit {code}\n"
        )
        binary.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return asked

    return make


def test_how_it_is_asked_and_understood(stand_in, tmp_path):
    asked = stand_in(json.dumps([ANSWER]))
    baseline = LlamaBenchRuntime(tmp_path / "m.gguf")
    assert baseline.run(Prefill(8, 16)).seconds == 2.5
    words = asked.read_text().split()
    options = dict(zip(words[::2], words[1::2], strict=True))
    assert options == {
        "-m": str(tmp_path / "m.gguf"), "-p": "8", "-n": "0", "-d": "16", "-r": "1", "-o": "json",
    }  # fmt: skip
    assert "abc123" in baseline.about
    baseline.run(Decode(4))
    assert "-p 0 -n 4 -d 0" in asked.read_text()


def test_it_runs_one_sequence_only(stand_in, tmp_path):
    stand_in("")
    baseline = LlamaBenchRuntime(tmp_path / "m.gguf")
    assert baseline.can(Prefill(8))
    assert baseline.can(Decode(8))
    assert not baseline.can(Decode(8, 0, 2))
    assert not baseline.can(Ragged((1,), (1,)))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "[{}]", '[{"samples_ns": []}]', "[1]", "[[], []]"]
)
def test_an_answer_that_is_none(stand_in, tmp_path, text):
    stand_in(text)
    with pytest.raises(BaselineError, match="answered with no times"):
        LlamaBenchRuntime(tmp_path / "m.gguf").run(Prefill(8))


def test_a_failure_tells_the_last_line(stand_in, tmp_path):
    stand_in("", code=3)
    with pytest.raises(BaselineError, match="exit code 3: no such thing"):
        LlamaBenchRuntime(tmp_path / "m.gguf").run(Prefill(8))


def test_a_directory(stand_in, tmp_path):
    stand_in("")
    with pytest.raises(ParameterError, match="a GGUF file"):
        LlamaBenchRuntime(tmp_path)


def test_not_on_the_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BaselineError, match="not on the path"):
        LlamaBenchRuntime(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("#!/bin/sh\nprintf 'broken \\377' >&2; exit 3\n", "exit code 3: broken"),
        ("#!/bin/sh\nkill -9 $$\n", "ended by signal 9"),
        ("#!/no/such/interpreter\n", "cannot be started"),
        ("no program", "cannot be started"),
    ],
)
def test_a_binary_that_is_none(tmp_path, monkeypatch, script, message):
    binary = tmp_path / "llama-bench"
    binary.write_text(script)
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(BaselineError, match=message):
        LlamaBenchRuntime(tmp_path / "m.gguf").run(Prefill(8))
