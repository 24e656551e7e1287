"""Perplexities and log-probabilities are those of llama.cpp's logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from real_models import Figures, RealModel
from real_texts import STORY

import mlxrun

# Relative errors of perplexities: ten times those seen. Errors of single tokens have either sign.
PERPLEXITY = {"smollm2": 2e-6, "gemma": 1e-4}
# Nats, ten times what was seen; of gemma because of ggml's table of GELU.
LOG_PROBABILITY = {"smollm2": 1e-3, "gemma": 2e-2}


def test_perplexity_is_llama_cpps(llm: mlxrun.LLM, model: RealModel, figures: Figures) -> None:
    expected = figures.facts["perplexity"]
    got = llm.perplexity(STORY, context=expected["context"])
    assert got.tokens == expected["tokens"]
    assert got.perplexity.value == pytest.approx(expected["perplexity"], rel=PERPLEXITY[model.name])
    assert got.surprise.value == pytest.approx(
        expected["surprise"]["value"], rel=PERPLEXITY[model.name]
    )
    assert got.surprise.error == pytest.approx(expected["surprise"]["error"], rel=1e-4)


def test_log_probabilities_are_of_probabilities_that_sum_to_one(llm: mlxrun.LLM) -> None:
    size = llm.tokenizer.vocab_size
    completion = llm.generate(
        "The capital of France is", max_tokens=2, temperature=0, logprobs=size
    )
    for entry in completion.logprobs:
        assert len(entry.top) == size
        assert math.fsum(math.exp(each.logprob) for each in entry.top) == pytest.approx(1, abs=2e-6)
        assert (entry.top[0].token, entry.top[0].logprob) == (entry.token, entry.logprob)


@pytest.mark.parametrize("position", [7, 63, 200])
def test_log_probabilities_are_llama_cpps(
    llm: mlxrun.LLM, model: RealModel, figures: Figures, position: int
) -> None:
    kept = figures.arrays
    index = kept["positions"].tolist().index(position)
    prompt = kept["story"][: position + 1].tolist()
    (entry,) = llm.generate(prompt, max_tokens=1, temperature=0, logprobs=8).logprobs
    expected = kept["top_logits"][index].astype(np.float64) - kept["logsumexp"][index]
    got = {each.token: each.logprob for each in entry.top}
    for token, value in zip(kept["top_tokens"][index][:4].tolist(), expected[:4], strict=True):
        assert got[token] == pytest.approx(value, abs=LOG_PROBABILITY[model.name])
