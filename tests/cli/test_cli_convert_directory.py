"""``mlxrun convert DIRECTORY``: options, what is printed, and what is refused before any work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_models import Tiny

import mlxrun
from mlxrun import convert


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory of floats, with code that is never run."""
    folder = tmp_path_factory.mktemp("source")
    source = Tiny(hidden=128, ffn=192, kinds={"*": "F16"}).write(folder / "x.gguf")
    convert(source, folder / "m")
    (folder / "m" / "modeling_x.py").write_text("raise SystemExit")
    return folder / "m"


def test_summary(mlxrun_cli, directory, tmp_path):
    target = tmp_path / "out"
    result = mlxrun_cli("convert", directory, "-o", target, "--bits", 4, "--keep", "lm_head=8")
    assert (result.code, result.err) == (0, "")
    rows = [line.split() for line in result.out.splitlines()]
    assert ["float16", "affine4", "g64", "float16", "15", "requantized"] in [r[:6] for r in rows]
    assert ["float16", "affine8", "g64", "float16", "1", "requantized"] in [r[:6] for r in rows]
    assert "skipped modeling_x.py (file): code is neither run nor copied\n" in result.out
    assert f"Wrote {target}\n" in result.out
    assert mlxrun.load(target).generate("x", max_tokens=2).tokens


def test_a_directory_that_cannot_be_talked_with(mlxrun_cli, directory, tmp_path):
    path = shutil.copytree(directory, tmp_path / "m")
    for file in path.glob("tokenizer*"):
        file.unlink()
    result = mlxrun_cli("convert", path, "-o", tmp_path / "out")
    assert result.code == 0 and result.error.startswith(f"warning: {path} has no tokenizer")
    assert f"Wrote {tmp_path / 'out'}" in result.out and "Next:" not in result.out


def test_many_of_one_reason_are_reported_as_one(mlxrun_cli, directory, tmp_path):
    result = mlxrun_cli(
        "convert", directory, "-o", tmp_path / "o", "--bits", 4, "--group-size", 128
    )
    assert result.code == 0
    assert result.out.count("192 columns do not divide into groups of 128") == 2  # two layers


def test_json_is_what_is_stored(mlxrun_cli, directory, tmp_path):
    result = mlxrun_cli("convert", directory, "-o", tmp_path / "o", "--mode", "mxfp8", "--json")
    report = json.loads(result.out)
    stored = json.loads((tmp_path / "o" / "conversion.json").read_text())
    assert report["tensors"] == stored["tensors"]
    assert report["policy"] == "mxfp8"
    assert report["source"]["format"] == "safetensors"


def test_the_api_says_the_same(directory, tmp_path, mlxrun_cli):
    options = {"bits": 5, "group_size": 32, "mode": "affine", "keep": "embed=8", "dtype": "float16"}
    report = mlxrun.convert(directory, tmp_path / "api", **options)
    flags = [
        word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", value)
    ]
    assert mlxrun_cli("convert", directory, "-o", tmp_path / "cli", *flags).code == 0
    one, other = (np.fromfile(tmp_path / n / "model.safetensors", "u1") for n in ("api", "cli"))
    assert np.array_equal(one, other)
    assert report.path == str(tmp_path / "api")


REFUSED = {
    "a mode of other bits": (["--mode", "mxfp4", "--bits", "8"], "mxfp4 has 4 bits"),
    "a mode of other groups": (["--mode", "nvfp4", "--group-size", "32"], "groups of 16"),
    "bits that are none": (["--bits", "7"], "bits must be one of"),
    "a group size alone": (["--group-size", "64"], "needs bits"),
    "a policy for a directory": (["--policy", "near"], "policies are for GGUF files"),
    "a policy and bits": (["--policy", "near", "--bits", "4"], "a policy is for GGUF files"),
    "an entry that is none": (["--bits", "4", "--keep", "lm_head"], "not pattern=form"),
    "a pattern of nothing": (["--bits", "4", "--keep", "lm_haed=8"], "the nearest is lm_head"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_combinations_are_one_line_and_write_nothing(mlxrun_cli, directory, tmp_path, name):
    options, message = REFUSED[name]
    result = mlxrun_cli("convert", directory, "-o", tmp_path / "out", *options)
    assert result.code == 1
    assert message in result.error
    assert list(tmp_path.iterdir()) == []


def test_bits_for_a_gguf_are_refused(mlxrun_cli, model, tmp_path):
    for options in (["--bits", "4"], ["--dtype", "float16"], ["--keep", "lm_head=8"]):
        result = mlxrun_cli("convert", model, "-o", tmp_path / "out", *options)
        assert result.code == 1
        assert "is a GGUF file" in result.error
    assert list(tmp_path.iterdir()) == []


def test_the_default_target_is_named_after_the_directory(
    mlxrun_cli, directory, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert mlxrun_cli("convert", directory, "--bits", "8").code == 0
    assert (tmp_path / "m-mlx" / "config.json").is_file()


def test_an_interrupt_leaves_nothing(mlxrun_cli, directory, tmp_path, monkeypatch):
    def interrupt(self, done, total, *rest):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlxrun.cli.console.Bar.__call__", interrupt)
    assert mlxrun_cli("convert", directory, "-o", tmp_path / "out", "--bits", "4").code == 130
    assert list(tmp_path.iterdir()) == []
