"""Usage and log-probabilities of a completion."""

from __future__ import annotations

import json
import time

import pytest
from tiny_models import Tiny

import mlxrun
from mlxrun.engine.detokenize import MIN_TIMED_TOKENS, OutputProcessor
from mlxrun.outputs import Request


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> mlxrun.LLM:
    path = tmp_path_factory.mktemp("completion") / "m.gguf"
    return mlxrun.load(Tiny(layers=1).write(path))


@pytest.mark.parametrize("count", [0, 1, MIN_TIMED_TOKENS - 2, MIN_TIMED_TOKENS - 1, 20])
def test_the_token_that_ends_the_turn_is_not_counted(llm: mlxrun.LLM, count: int) -> None:
    completion = OutputProcessor(Request([5, 6]), llm.tokenizer, 100, time.perf_counter())
    tokens = [token for token in range(60, 100) if token not in llm.tokenizer.eog_ids][:count]
    chunks = [completion.add(token) for token in (*tokens, min(llm.tokenizer.eog_ids))]
    assert chunks.pop() is None
    assert completion.finish_reason == "stop"
    usage = completion.finish().usage
    assert usage is not None
    assert usage.completion_tokens == len(chunks) == count
    assert usage.prompt_tokens_per_second is not None
    # The step of that token took time, too.
    assert (usage.tokens_per_second is None) == (count + 1 < MIN_TIMED_TOKENS)
    assert bool(usage.speed) == (count + 1 >= MIN_TIMED_TOKENS)


def test_completions_count_their_tokens(llm: mlxrun.LLM) -> None:
    end = min(llm.tokenizer.eog_ids)
    for options in ({"logit_bias": {end: 1000.0}}, {"ignore_eos": True}):
        completion = llm.generate("tea", max_tokens=3, **options)
        assert completion.usage.completion_tokens == len(completion.tokens)
        data = json.loads(json.dumps(completion.to_dict()))
        assert data["usage"]["tokens_per_second"] is None
    (together,) = llm.batch(["tea"], max_tokens=3, logit_bias={end: 1000.0})
    assert (together.usage.completion_tokens, together.finish_reason) == (0, "stop")


def test_a_request_that_never_began_has_no_rates(llm: mlxrun.LLM) -> None:
    output = OutputProcessor(Request([5]), llm.tokenizer, 9, time.perf_counter())
    usage = output.finish("cancelled").usage
    assert usage is not None
    assert usage.tokens_per_second is usage.prompt_tokens_per_second is None


def test_log_probabilities_are_of_texts(llm: mlxrun.LLM) -> None:
    completion = llm.generate("tea", max_tokens=6, ignore_eos=True, logprobs=3, seed=1)
    assert [entry.token for entry in completion.logprobs] == completion.tokens
    for entry in (*completion.logprobs, *completion.logprobs[0].top):
        assert entry.bytes == llm.tokenizer.token_bytes(entry.token)
        assert entry.text == entry.bytes.decode("utf-8", "replace")
    shown = completion.to_dict()["logprobs"][0]
    assert set(shown) == {"token", "text", "bytes", "logprob", "top"}
    assert [set(each) for each in shown["top"]] == 3 * [{"token", "text", "bytes", "logprob"}]


def test_logits_beyond_the_vocabulary_have_no_text(llm: mlxrun.LLM) -> None:
    from mlxrun.outputs import TokenLogprob

    beyond = TokenLogprob(llm.tokenizer.vocab_size + 1, -2.0)
    completion = OutputProcessor(Request([5]), llm.tokenizer, 9, time.perf_counter())
    chunk = completion.add(70, (TokenLogprob(70, -1.0, (TokenLogprob(70, -1.0), beyond)),))
    assert chunk is not None
    assert [entry.bytes for entry in chunk.logprobs[0].top][1] == b""
