"""The commands on a model that only mlx-lm defines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlx_lm_models import CONFIGS, save, stock

import mlxrun
from mlxrun.cli.inspection import inspect_model

# A state and keys and values; windows.
NAMES = ("falcon_h1", "recurrent_gemma")


@pytest.fixture(scope="module", params=NAMES)
def directory(request, tmp_path_factory) -> Path:
    config = CONFIGS[request.param]
    return save(tmp_path_factory.mktemp(request.param) / "model", config, stock(config))


def test_inspect_says_through_what_it_runs(directory, mlxrun_cli):
    result = mlxrun_cli("inspect", directory)
    assert result.code == 0
    assert "through mlx-lm" in result.out
    facts = json.loads(mlxrun_cli("inspect", directory, "--json", "--context", 500).out)
    llm = mlxrun.load(directory)
    model = facts["model"]
    assert (model["vocabulary"], model["layers"]) == (llm.model.vocab_size, 2)
    session = llm.session()
    llm.generate([5] * 498, session=session, max_tokens=3)
    assert session.nbytes == facts["plan"]["sequence"]


def test_generate_and_chat(directory, mlxrun_cli):
    result = mlxrun_cli(
        "generate", directory, "--max-tokens", 5, "--temp", 0, "--verbose", "--prompt", "hello"
    )
    assert result.code == 0
    assert "through mlx-lm, 2 layers" in result.err
    assert result.out.strip()
    lines = b"one\ntwo\n"
    assert mlxrun_cli("chat", directory, "--max-tokens", 5, "--temp", 0, stdin=lines).code == 0


def test_failures_are_one_line(directory, mlxrun_cli, tmp_path):
    config = json.loads((directory / "config.json").read_text())
    for changes in ({"model_type": "no_such"}, {"model_file": "x.py"}, {"vocab_size": 7}):
        broken = tmp_path / "-".join(changes)
        broken.mkdir()
        for file in directory.iterdir():
            (broken / file.name).write_bytes(file.read_bytes())
        (broken / "config.json").write_text(json.dumps(config | changes))
        result = mlxrun_cli("generate", broken, "--prompt", "hello")
        assert result.code != 0
        assert result.error.startswith("error:")
        assert mlxrun_cli("inspect", broken).code == 0


def test_our_own_families_have_no_such_line(model):
    assert inspect_model(model, context=None)["model"]["runs"] is None
