"""``mlxrun perplexity`` and ``mlxrun compare``: tables for people, objects for programs."""

from __future__ import annotations

import json

import pytest
from tiny_models import Tiny

from mlxrun.eval.kl_divergence import DivergenceScorer
from mlxrun.eval.perplexity import PerplexityScorer

TEXT = "she tells the story of another tree and the rain " * 12
SMALL = ("--context", "64")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_perplexity(mlxrun_cli, model, llm, text):
    result = mlxrun_cli("perplexity", model, text, *SMALL)
    assert (result.code, result.err) == (0, "")
    value, _, tokens = result.out.splitlines()
    expected = llm.perplexity(TEXT, context=64)
    assert value.split()[1] == f"{expected.perplexity.value:.5g}"
    assert f"{expected.tokens} tokens" in tokens


def test_perplexity_of_standard_input_as_json(mlxrun_cli, model, llm):
    result = mlxrun_cli("perplexity", model, "-", *SMALL, "--json", stdin=TEXT.encode())
    found = json.loads(result.out)
    assert found["perplexity"]["value"] == llm.perplexity(TEXT, context=64).perplexity.value
    assert (found["context"], found["scored"], found["interrupted"]) == (64, 31, False)


def test_lengths_as_people_write_them(mlxrun_cli, tmp_path):
    model = Tiny(keys={"context_length": 1024}).write(tmp_path / "longer.gguf")
    sizes = ("--context", "1k", "--stride", "512", "--chunks", "1", "--json")
    result = mlxrun_cli("perplexity", model, "-", *sizes, stdin=TEXT.encode() * 12)
    found = json.loads(result.out)
    assert (found["context"], found["scored"]) == (1024, 512)
    for wrong in ("0", "1g", "-1"):
        assert mlxrun_cli("perplexity", model, "-", "--stride", wrong).code == 2


def test_a_model_does_not_differ_from_itself(mlxrun_cli, model, text):
    result = mlxrun_cli("compare", model, model, text, *SMALL, "--json")
    found = json.loads(result.out)
    assert found["divergence"] == {"value": 0, "error": 0}
    assert found["agreement"]["value"] == 1


def test_options_of_b_are_not_those_of_a(mlxrun_cli, model, text):
    said = ("--b-cache-type-k", "q4", "--b-cache-type-v", "q4")
    found = json.loads(mlxrun_cli("compare", model, model, text, *SMALL, *said, "--json").out)
    assert found["divergence"]["value"] > 0
    assert (found["a"]["cache_type_k"], found["b"]["cache_type_k"]) == (None, "q4")
    plain = mlxrun_cli("compare", model, model, text, *SMALL, *said)
    assert "KL divergence" in plain.out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "text.txt': No such file or directory"),
        (b"", "a text that is not empty"),
        (b"ab\xff", "is not UTF-8 text: invalid start byte at 2"),
        (b"short", "at least 64, a window"),
    ],
)
@pytest.mark.parametrize("command", ["perplexity", "compare"])
def test_texts_that_cannot_be_scored(mlxrun_cli, model, tmp_path, command, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    models = (model, model) if command == "compare" else (model,)
    result = mlxrun_cli(command, *models, path, *SMALL)
    assert (result.code, result.out) == (1, "")
    assert message in result.error


@pytest.mark.parametrize("form", ["--json", None])
@pytest.mark.parametrize("command", ["perplexity", "compare"])
def test_ctrl_c_prints_the_result_so_far(mlxrun_cli, model, text, monkeypatch, command, form):
    kind = DivergenceScorer if command == "compare" else PerplexityScorer
    real, calls = kind.score, []

    def score(self, ids):
        calls.append(ids)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return real(self, ids)

    monkeypatch.setattr(kind, "score", score)
    models = (model, model) if command == "compare" else (model,)
    result = mlxrun_cli(command, *models, text, *SMALL, *([form] if form else []))
    assert result.code == 130
    assert result.error.startswith("interrupted after 2 of ")
    if form:
        found = json.loads(result.out)
        assert (found["windows"], found["interrupted"]) == (2, True)
    else:
        assert "2 windows of 64" in result.out
