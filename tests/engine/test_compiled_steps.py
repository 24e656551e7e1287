"""A compiled step computes the same as one that is built anew."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from requests_of import VOCABULARY, Ask, alone, engine_of, model_of, play, prompts
from tiny_models import Tiny

import mlxrun
from mlxrun.config import CacheConfig
from mlxrun.engine import model_runner
from mlxrun.engine.model_runner import COMPILED_STEPS, DecodeStep
from mlxrun.kv_cache.batch import DecodeRows
from mlxrun.sampling.sampler import Sampler, SamplerBatch
from mlxrun.sampling_params import SamplingParams

NEVER = 1 << 30
GREEDY = SamplingParams(temperature=0)
#: A stage of every kind, and a report.
ELABORATE = SamplingParams(
    temperature=0.9, seed=7, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.1,
    frequency_penalty=0.1, logit_bias={5: 1.5}, logprobs=2,
)  # fmt: skip
PROMPT = list(range(3, 40))


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> mlxrun.LLM:
    """A model whose sessions share nothing with each other."""
    path = Tiny(hidden=64, heads=2, kv_heads=1, ffn=48, layers=2, vocab=VOCABULARY + 160).write(
        tmp_path_factory.mktemp("tiny") / "x.gguf"
    )
    llm = mlxrun.load(path, dtype="float32")
    llm.prefix_cache.budget = 0
    return llm


@pytest.fixture(scope="module")
def tiny(llm: mlxrun.LLM) -> Any:
    return llm.model


@pytest.fixture
def decode_step(llm: mlxrun.LLM) -> Iterator[DecodeStep]:
    """The decode step of the model's own engine, with nothing compiled."""
    step = llm.direct_engine.runner.decode_step
    step.compiled.clear()
    after = step.compile_after
    yield step
    step.compile_after = after


def generated(
    llm: mlxrun.LLM, params: SamplingParams, count: int, options: dict[str, Any]
) -> tuple[list[mlxrun.Chunk], list[mx.array]]:
    """The chunks, and the contents of the caches afterwards."""
    session = llm.session(**options)
    stream = llm.stream(PROMPT, session=session, max_tokens=count, ignore_eos=True, params=params)
    chunks = [chunk for chunk in stream if chunk.tokens]
    return chunks, [array for cache in session.cache for array in cache.state]


@pytest.mark.parametrize("params", [GREEDY, ELABORATE], ids=["greedy", "elaborate"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_type_k": "q8", "cache_type_v": "q4"},
        {"cache_type_k": "f16"},
        {"window": 20, "keep": 3},
        {"window": 20, "cache_type_k": "q8", "cache_type_v": "q8"},
    ],
    ids=str,
)
def test_a_compiled_step_is_the_step(
    llm: mlxrun.LLM, decode_step: DecodeStep, options: dict[str, Any], params: SamplingParams
) -> None:
    """Across the wrap of a window, and across a bucket's edge: 37 + 230 tokens."""
    count = 40 if "window" in options else 230
    decode_step.compile_after = NEVER
    expected, held = generated(llm, params, count, options)
    assert not decode_step.compiled
    decode_step.compile_after = 0
    got, also = generated(llm, params, count, options)
    assert decode_step.compiled
    assert len(got) == count
    assert [chunk.tokens for chunk in got] == [chunk.tokens for chunk in expected]
    for one, other in zip(held, also, strict=True):
        used = one.shape[2] if "window" in options else len(PROMPT) + count - 1
        assert mx.allclose(
            one[:, :, :used].astype(mx.float32), other[:, :, :used].astype(mx.float32), atol=1e-5
        ) or one.dtype == mx.uint32  # fmt: skip
    for a, b in zip(expected, got, strict=True):
        for report, other_report in zip(a.logprobs, b.logprobs, strict=True):
            assert report.logprob == pytest.approx(other_report.logprob, abs=1e-4)


@pytest.mark.parametrize(
    "name", ["gemma2-caps", "gemma3-windows", "gpt-oss-small", "deepseek2-lite", "bloom-560m"]
)
def test_every_kind_of_layer(tmp_path: Path, name: str) -> None:
    model, outputs = model_of(name, tmp_path), []
    for after in (NEVER, 2):
        engine, ask = engine_of(model, rows=1), Ask(PROMPT, 24, GREEDY)
        engine.runner.decode_step.compile_after = after
        ask.submit(engine)
        play(engine)
        assert bool(engine.runner.decode_step.compiled) == (after == 2)
        outputs.append(ask.tokens)
    assert outputs[0] == outputs[1] == alone(model, Ask(PROMPT, 24, GREEDY))


@pytest.mark.parametrize("deterministic", [False, True])
def test_rows_join_and_leave_between_compiled_steps(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    monkeypatch.setattr(model_runner, "COMPILE_AFTER", 2)
    asks = [
        Ask(prompt, 5 + 7 * i, ELABORATE if i % 2 else GREEDY)
        for i, prompt in enumerate(prompts(6, 30, seed=3))
    ]
    expected = [alone(tiny, ask) for ask in asks]
    engine = engine_of(tiny, rows=4, deterministic=deterministic)
    for ask in asks:
        ask.submit(engine)
    play(engine)
    assert engine.runner.decode_step.compiled
    assert [ask.tokens for ask in asks] == expected


def test_a_step_is_compiled_after_a_few_equal_ones(llm: mlxrun.LLM, decode_step: Any) -> None:
    assert decode_step.compile_after == model_runner.COMPILE_AFTER
    generated(llm, GREEDY, model_runner.COMPILE_AFTER + 1, {})
    assert not decode_step.compiled
    generated(llm, GREEDY, model_runner.COMPILE_AFTER + 2, {})
    assert len(decode_step.compiled) == 1


def test_where_steps_cannot_be_compiled_they_are_built(
    llm: mlxrun.LLM, decode_step: DecodeStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = generated(llm, GREEDY, 9, {})
    decode_step.compiled.clear()
    monkeypatch.setattr(decode_step, "compile_error", "no compiler")
    got, _ = generated(llm, GREEDY, 9, {})
    assert not decode_step.compiled
    assert [chunk.tokens for chunk in got] == [chunk.tokens for chunk in expected]


def test_steps_that_are_no_pure_function_are_not_compiled(tiny: Any, tmp_path: Path) -> None:
    assert not DecodeRows.possible(tiny.make_cache())  # empty
    cases: list[tuple[Any, CacheConfig, bool]] = [
        (tiny, CacheConfig(), True),
        (tiny, CacheConfig(attention="blocks:4x16"), False),
        (model_of("mamba2-130m", tmp_path), CacheConfig(), False),
    ]
    for model, config, possible in cases:
        engine, ask = engine_of(model, rows=2), Ask(PROMPT, 8, GREEDY)
        engine.runner.decode_step.compile_after = 0
        ask.submit(engine, config)
        play(engine)
        assert bool(engine.runner.decode_step.compiled) == possible
        assert ask.tokens == alone(model, Ask(PROMPT, 8, GREEDY), config)


def compiled_with(step: DecodeStep, tiny: Any, length: int, top_k: int) -> None:
    """One compiled step of a row, with a kind of sampler for each ``top_k``."""
    caches = tiny.make_cache()
    tiny(mx.array([[3] * length]), caches)
    sampler = Sampler(SamplingParams(temperature=0.5, seed=1, top_k=top_k), tiny.vocab_size)
    tokens, _ = step(mx.array([4]), [DecodeRows(caches)], SamplerBatch().arrange([sampler]))
    mx.eval(tokens)


def test_compiled_steps_are_few_and_belong_to_a_thread(tiny: Any) -> None:
    """MLX aborts where a compiled function outlives the thread that made it."""
    step, seen = DecodeStep(tiny), []

    def play_many() -> None:
        for length in range(2, 2 + COMPILED_STEPS + 3):
            compiled_with(step, tiny, length, top_k=length)
        seen.append(len(step.compiled))

    thread = threading.Thread(target=play_many)
    thread.start()
    thread.join()
    assert seen == [COMPILED_STEPS]
    assert not step.compiled


def test_the_step_that_was_used_least_recently_goes_first(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_runner, "COMPILED_STEPS", 2)
    step, made = DecodeStep(tiny), []
    for top_k in (2, 3, 2, 4):
        compiled_with(step, tiny, 2, top_k)
        made.append(next(reversed(step.compiled.values())))
    first, second, again, last = made
    assert first is again
    assert [id(one) for one in step.compiled.values()] == [id(first), id(last)]
    assert second is not last


def test_a_step_copies_no_capacity(tmp_path: Path) -> None:
    """The allocations of a compiled step do not grow with its caches.

    Of a model with few layers it may: MLX queues some hundred operations ahead, and while those of
    the step before still wait to read a cache, it is not written in place.
    """
    shape = Tiny(hidden=64, heads=2, kv_heads=1, ffn=48, layers=24, vocab=VOCABULARY + 160)
    llm = mlxrun.load(shape.write(tmp_path / "x.gguf"), dtype="float32")
    llm.direct_engine.runner.decode_step.compile_after = 0
    peaks = []
    for length in (300, 2000):
        chunks = llm.stream([5] * length, max_tokens=12, temperature=0, ignore_eos=True)
        for _ in range(6):
            next(chunks)
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        for _ in range(4):
            next(chunks)
        mx.synchronize()
        peaks.append(mx.get_peak_memory() - before)
    one_layer = 2000 * 2 * 32 * 4
    assert peaks[1] - peaks[0] < one_layer
