"""Models that read texts: llama.cpp's figures, caches that store in fewer bits, and refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm_models import CONFIGS, save, stock
from requantized import requantized
from tiny_models import Tiny

import mlxrun
from mlxrun.config import CacheConfig
from mlxrun.engine import prefix_reuse
from mlxrun.errors import CacheError, MemoryLimitError, NumericError, ParameterError, TokenizerError
from mlxrun.eval import perplexity as scoring
from mlxrun.eval.kl_divergence import DivergenceScorer
from mlxrun.eval.perplexity import PerplexityScorer

FIGURES = json.loads(
    (Path(__file__).parents[1] / "oracle" / "perplexity.json").read_text(encoding="utf-8")
)
ASSETS = Path(mlxrun.__file__).parent / "assets"
TEXT = "she tells the story of another tree and the rain " * 12


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> mlxrun.LLM:
    return mlxrun.load(Tiny().write(tmp_path_factory.mktemp("tiny") / "tiny.gguf"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> mlxrun.LLM:
    return mlxrun.load(Tiny(seed=1).write(tmp_path_factory.mktemp("other") / "other.gguf"))


@cache
def loaded(path: Path) -> mlxrun.LLM:
    return mlxrun.load(path, dtype="float32")


def case_name(case: dict[str, Any]) -> str:
    return "-".join(str(case[name]) for name in ("model", "context", "stride"))


@pytest.mark.parametrize("case", FIGURES["perplexity"], ids=case_name)
def test_perplexities_are_llama_cpps(case, request):
    if case["model"] == "stories":
        path = request.getfixturevalue("oracle") / "stories" / "stories260K.gguf"
    else:
        path = ASSETS / f"{case['model']}.gguf"
    options = {name: case[name] for name in ("context", "stride", "bos")}
    got = loaded(path).perplexity(FIGURES["text"], **options)
    assert got.tokens == case["tokens"]
    assert got.perplexity.value == pytest.approx(case["perplexity"], rel=1e-5)
    assert got.surprise.value == pytest.approx(case["surprise"]["value"], rel=1e-5)
    assert got.surprise.error == pytest.approx(case["surprise"]["error"], rel=1e-4)


def test_divergences_are_those_of_llama_cpps_logits():
    case = FIGURES["divergence"]
    a, b = (loaded(ASSETS / f"{case[x]}.gguf") for x in "ab")
    got = mlxrun.compare(a, b, FIGURES["text"], context=case["context"])
    for name in ("divergence", "agreement", "log_ratio", "change"):
        estimate = getattr(got, name)
        assert estimate.value == pytest.approx(case[name]["value"], rel=1e-4), name
        assert estimate.error == pytest.approx(case[name]["error"], rel=1e-4), name
    assert got.rms_change.value == pytest.approx(case["rms_change"], rel=1e-4)
    assert got.largest == pytest.approx(case["largest"], rel=1e-4)
    assert got.percentiles["50"] == pytest.approx(case["median"], rel=1e-4)


@pytest.mark.parametrize("kind", ["ours", "mlx-lm's"])
@pytest.mark.parametrize(("first", "rows"), [(0, 7), (19, 5), (31, 64), (63, 16)])
def test_parts_of_a_window_are_its_logits(tiny, tmp_path, monkeypatch, kind, first, rows):
    if kind != "ours":
        tiny = mlxrun.load(save(tmp_path, CONFIGS["mamba2"], stock(CONFIGS["mamba2"])))
    monkeypatch.setattr(prefix_reuse, "PREFILL_CHUNK", 32)
    monkeypatch.setattr(scoring, "rows_at_once", lambda _: rows)
    ids = tiny.tokenizer.encode(TEXT)[:80]
    parts = list(scoring.logits_of(tiny, CacheConfig(), ids, first))
    assert all(len(logits) <= rows and logits.dtype == mx.float32 for logits, _ in parts)
    logits = mx.concatenate([logits for logits, _ in parts])
    targets = mx.concatenate([targets for _, targets in parts])
    assert targets.tolist() == ids[first + 1 :]
    expected = np.array(tiny.logits(ids))[first:-1]
    np.testing.assert_allclose(np.array(logits), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("keys", "values"), [("q4", "q4"), ("q8", None), ("q4c/32", "q8")])
def test_a_window_attends_to_itself_as_it_is_stored(tiny, monkeypatch, keys, values):
    options = {"context": 160, "cache_type_k": keys, "cache_type_v": values}
    whole = tiny.perplexity(TEXT, **options)
    monkeypatch.setattr(prefix_reuse, "PREFILL_CHUNK", 8)
    parts = tiny.perplexity(TEXT, **options)
    assert parts.surprise.value == pytest.approx(whole.surprise.value, rel=1e-4)
    assert abs(whole.surprise.value - tiny.perplexity(TEXT, context=160).surprise.value) > 1e-5


def test_fewer_bits_diverge_more(tiny):
    found = [
        mlxrun.compare(tiny, tiny, TEXT, context=64, b_cache_type_k=bits, b_cache_type_v=bits)
        for bits in ("f32", "f16", "q8", "q4", "q2")
    ]
    divergences = [one.divergence.value for one in found]
    assert divergences[0] == 0
    assert divergences == sorted(divergences)
    assert found[-1].agreement.value < 1
    assert found[0].perplexity_a == found[-1].perplexity_a


def test_a_comparison_has_the_perplexities_of_each(tiny, other):
    got = mlxrun.compare(tiny, other, TEXT, context=64, b_cache_type_k="q8")
    a = tiny.perplexity(TEXT, context=64)
    b = other.perplexity(TEXT, context=64, cache_type_k="q8")
    assert got.perplexity_a.value == pytest.approx(a.perplexity.value, rel=1e-5)
    assert got.perplexity_b.value == pytest.approx(b.perplexity.value, rel=1e-5)
    assert (got.tokens, got.windows) == (a.tokens, a.windows)


def test_policies_on_the_demo_model(tmp_path):
    """Exact loses nothing, near hardly anything, compact more."""
    path = requantized(ASSETS / "demo.gguf", tmp_path / "demo-q6_k.gguf")
    plain, text = mlxrun.load(path, dtype="float32"), FIGURES["text"]
    exact, near, compact = (
        mlxrun.compare(plain, mlxrun.load(path, policy=policy), text, context=128, chunks=2)
        for policy in ("exact", "near", "compact")
    )
    assert exact.divergence.value < 1e-9  # float32 sums of products in another order
    assert exact.largest < 1e-8
    assert exact.agreement.value == 1
    assert 0 < near.divergence.value < 1e-3
    assert near.divergence.value < compact.divergence.value


def test_a_directory_is_compared_with_the_file_that_it_was_made_of(tmp_path):
    path = Tiny(kinds={"*": "Q8_0"}).write(tmp_path / "tiny.gguf")
    mlxrun.convert(path, tmp_path / "made", policy="exact")
    a, b = mlxrun.load(path), mlxrun.load(tmp_path / "made", dtype="float32")
    assert mlxrun.compare(a, b, TEXT, context=64).divergence.value < 1e-9


def test_a_model_that_mlx_lm_defines(tmp_path):
    config = CONFIGS["mamba2"]
    llm = mlxrun.load(save(tmp_path, config, stock(config)))
    got = llm.perplexity(TEXT, context=64, chunks=2)
    ids = PerplexityScorer(llm, TEXT, context=64).windows.tokens
    rows, targets = [], []
    for start in (0, 64):
        window = [*llm.tokenizer.prefix, *ids[start + len(llm.tokenizer.prefix) : start + 64]]
        rows.append(np.array(llm.logits(window), dtype=np.float64)[32:63])
        targets += window[33:]
    logits = np.concatenate(rows)
    surprise = np.log(np.exp(logits).sum(-1)) - logits[np.arange(62), targets]
    assert got.surprise.value == pytest.approx(surprise.mean(), rel=1e-5)
    assert mlxrun.compare(llm, llm, TEXT, context=64).divergence.value == 0
    with pytest.raises(CacheError):
        llm.perplexity(TEXT, context=64, cache_type_k="q8")


def test_progress_and_estimates(tiny):
    seen = []
    tiny.perplexity(TEXT, context=64, chunks=3, progress=lambda *at: seen.append(at))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    for run, figure in (
        (PerplexityScorer(tiny, TEXT, context=64), "perplexity"),
        (
            DivergenceScorer(tiny, tiny, TEXT, context=64, cache_b=CacheConfig(cache_type_k="q4")),
            "divergence",
        ),
    ):
        for done in run:
            result = run.result()
            assert (result.windows, run.estimate()) == (done, getattr(result, figure))


def test_control_tokens_in_a_text(tiny):
    text = "</s>" * 40 + TEXT
    plain = PerplexityScorer(tiny, text, context=64)
    marked = PerplexityScorer(tiny, text, context=64, parse_special=True)
    assert marked.windows.tokens.count(2) == 40
    assert plain.windows.tokens.count(2) == 0


def test_logits_that_are_no_numbers(tmp_path):
    damaged = {"output_norm.weight": np.full(64, np.nan)}
    llm = mlxrun.load(Tiny(weights=damaged).write(tmp_path / "nan.gguf"))
    with pytest.raises(NumericError, match="not finite"):
        llm.perplexity(TEXT, context=64)
    with pytest.raises(NumericError, match="not finite"):
        mlxrun.compare(llm, llm, TEXT, context=64)


def test_vocabularies_of_different_sizes(tiny, tmp_path):
    small = mlxrun.load(Tiny(vocab=280).write(tmp_path / "small.gguf"))
    with pytest.raises(TokenizerError, match="A has 288 tokens, B has 280"):
        mlxrun.compare(tiny, small, TEXT, context=64)


def test_vocabularies_with_other_tokens(tiny, other, monkeypatch):
    parts = other.tokenizer._parts
    for name, value in (("piece", "?"), ("token_bytes", b"?")):
        monkeypatch.setattr(type(other.tokenizer), name, _with(other.tokenizer, name, 261, value))
    with pytest.raises(TokenizerError, match=r"token 261 is 't' in A and '\?' in B"):
        mlxrun.compare(tiny, other, TEXT, context=64)
    monkeypatch.undo()
    monkeypatch.setattr(other.tokenizer, "_parts", replace(parts, before=()))
    with pytest.raises(TokenizerError, match="A puts <s> before a text, B nothing"):
        mlxrun.compare(tiny, other, TEXT, context=64)


def _with(tokenizer: mlxrun.Tokenizer, name: str, token: int, value: Any) -> Any:
    """A method with another result for one token of one tokenizer."""
    real = getattr(type(tokenizer), name)
    return lambda self, i: value if self is tokenizer and i == token else real(self, i)


def test_texts_that_are_cut_differently(tiny, other, monkeypatch):
    real = other.tokenizer._parts.encoder
    parts = replace(other.tokenizer._parts, encoder=lambda *x: real(*x)[:50])
    monkeypatch.setattr(other.tokenizer, "_parts", parts)
    with pytest.raises(TokenizerError, match="differently from token 50 on"):
        mlxrun.compare(tiny, other, TEXT, context=64)


def test_an_evaluation_that_does_not_fit_in_memory(tiny, monkeypatch):
    monkeypatch.setenv("MLXRUN_MEMORY_LIMIT", "70MB")
    with pytest.raises(MemoryLimitError, match="scoring the text needs"):
        tiny.perplexity(TEXT, context=64)
    with pytest.raises(MemoryLimitError, match="comparing the two, both in memory, needs"):
        mlxrun.compare(tiny, tiny, TEXT, context=64)


@pytest.mark.parametrize("keys", ["q9", 8])
def test_types_that_are_none(tiny, keys):
    with pytest.raises(ParameterError, match="cache_type_k"):
        tiny.perplexity(TEXT, context=64, cache_type_k=keys)


def test_no_text(tiny):
    with pytest.raises(ParameterError, match="text must be a string"):
        tiny.perplexity(b"bytes")


def test_a_path_is_no_model(tiny):
    with pytest.raises(ParameterError, match=r"b must be a model, as mlxrun\.load returns it"):
        mlxrun.compare(tiny, "tiny.gguf", TEXT)
