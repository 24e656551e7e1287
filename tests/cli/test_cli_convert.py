"""``mlxrun convert`` and ``mlxrun pull``: what they print, and what they leave behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from patience import PATIENCE
from tiny_models import Tiny

import mlxrun


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A model of several types, with a tensor that has no place in it."""
    kinds = {"*": "Q4_0", "output.weight": "Q8_0", "token_embd.weight": "F16"}
    folder = tmp_path_factory.mktemp("mixed")
    model = Tiny(kinds=kinds, rope_freqs=np.full(8, 2, np.float32))
    return model.write(folder / "mixed.gguf")


def test_summary(mlxrun_cli, mixed, tmp_path):
    target = tmp_path / "out dir"
    result = mlxrun_cli("convert", mixed, "-o", target)
    assert (result.code, result.err) == (0, "")
    rows = [line.split() for line in result.out.splitlines()]
    assert ["Q4_0", "affine4", "g32", "float16", "14", "exact", "0", "4.5", "5"] in rows
    assert any(row[:5] == ["Q8_0", "affine8", "g32", "float16", "1"] for row in rows)
    assert "skipped rope_freqs.weight (F32): " in result.out
    assert f"Wrote {target}\n" in result.out
    assert result.out.endswith(f"Next: mlxrun chat '{target}'\n")
    assert mlxrun.load(target).generate("x", max_tokens=2).tokens


def test_json(mlxrun_cli, mixed, tmp_path):
    result = mlxrun_cli("convert", mixed, "-o", tmp_path / "out", "--policy", "exact", "--json")
    report = json.loads(result.out)
    assert report["policy"] == "exact" and report["path"] == str(tmp_path / "out")
    assert {tensor["fidelity"] for tensor in report["tensors"]} == {"exact"}
    stored = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert report["tensors"] == stored["tensors"]


def test_existing_target(mlxrun_cli, model, tmp_path):
    target = tmp_path / "out"
    assert mlxrun_cli("convert", model, "-o", target).code == 0
    again = mlxrun_cli("convert", model, "-o", target)
    assert again.code == 1 and "already exists" in again.error and "--overwrite" in again.error
    assert mlxrun_cli("convert", model, "-o", target, "--overwrite").code == 0


def test_default_target_is_in_the_working_directory(mlxrun_cli, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mlxrun_cli("convert", model).code == 0
    assert (tmp_path / "tiny-mlx" / "config.json").is_file()


def test_interrupt_leaves_nothing(mlxrun_cli, model, tmp_path, monkeypatch):
    def interrupt(self, done, total, *rest):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlxrun.cli.console.Bar.__call__", interrupt)
    assert mlxrun_cli("convert", model, "-o", tmp_path / "out").code == 130
    assert list(tmp_path.iterdir()) == []


def test_kill_leaves_nothing_under_the_name(mlxrun_cli, model, tmp_path):
    code = (
        "import os, signal, sys; from mlxrun.cli import console, main\n"
        "console.Bar.__call__ = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "main.main(['convert', sys.argv[1], '-o', sys.argv[2]])"
    )
    target = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", code, model, target], timeout=PATIENCE)
    assert done.returncode == -9
    assert not target.exists()
    assert mlxrun_cli("convert", model, "-o", target).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_pull_prints_the_path(mlxrun_cli, monkeypatch):
    asked = []

    def pull(source, *, progress, notify):
        asked.append(source)
        notify("downloading 4.9 GB")
        progress(1, 2)
        return Path("/somewhere/model.gguf")

    monkeypatch.setattr("mlxrun.hub.pull", pull)
    result = mlxrun_cli("pull", "org/repo:Q4_K_M")
    assert (result.code, result.out) == (0, "/somewhere/model.gguf\n")
    assert result.error == "downloading 4.9 GB"
    assert asked == ["org/repo:Q4_K_M"]


def test_pull_of_no_name(mlxrun_cli):
    result = mlxrun_cli("pull", "nonsense")
    assert result.code == 1 and "org/repo" in result.error
