"""A recorded step computes what the same step computes when it is built anew."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from cache_configs import caching
from test_serving import VOCABULARY, Ask, alone, model_of, play, prompts
from tiny_models import Tiny

from converters.gguf.reader import read_gguf
from mlxrun.generation import stepping
from mlxrun.generation.engine import Session, decode, prefill
from mlxrun.generation.sampling import Sampler
from mlxrun.generation.serving import Service
from mlxrun.generation.stepping import KINDS, Stepper
from mlxrun.kv_cache.batch import DecodeRows
from mlxrun.kv_cache.options import Blocks
from mlxrun.loader import load_model
from mlxrun.models.transformer import Transformer
from mlxrun.outputs import SamplingParams

NEVER = 1 << 30
GREEDY = SamplingParams(temperature=0)
#: A stage of every kind, and a report.
ELABORATE = SamplingParams(
    temperature=0.9, seed=7, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.1,
    frequency_penalty=0.1, logit_bias={5: 1.5}, logprobs=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    path = Tiny(hidden=64, heads=2, kv_heads=1, ffn=48, layers=2, vocab=VOCABULARY + 160).write(
        tmp_path_factory.mktemp("tiny") / "x.gguf"
    )
    model = load_model(read_gguf(path), dtype="float32").model
    assert isinstance(model, Transformer)
    return model


def steps(
    model: Any, params: SamplingParams, patience: int, count: int, made: Mapping[str, Any]
) -> tuple[list[Any], list[mx.array]]:
    """What is drawn, and what the caches hold afterwards."""
    stepper, prompt = Stepper(model), list(range(3, 40))
    stepper.patience = patience
    session = Session(lambda: model.make_cache(caching(**made)), owner=model)
    sampler = Sampler(params, model.vocab_size, context_tokens=prompt)
    drawn = list(decode(stepper, session, sampler, prefill(model, session, prompt), count))
    return drawn, [array for cache in session.cache for array in cache.state]


@pytest.mark.parametrize("params", [GREEDY, ELABORATE], ids=["greedy", "elaborate"])
@pytest.mark.parametrize(
    "made",
    [
        {},
        {"keys": "q8", "values": "q4"},
        {"keys": "f16"},
        {"window": 20, "keep": 3},
        {"window": 20, "keys": "q8", "values": "q8"},
    ],
    ids=str,
)
def test_a_recording_is_the_step(tiny: Transformer, made: dict[str, Any], params: Any) -> None:
    """Across the wrap of a window, and across a bucket's edge: 37 + 230 tokens."""
    count = 40 if "window" in made else 230
    wanted, held = steps(tiny, params, NEVER, count, made)
    got, also = steps(tiny, params, 0, count, made)
    assert [step.token for step in got] == [step.token for step in wanted]
    for one, other in zip(held, also, strict=True):
        used = one.shape[2] if "window" in made else 37 + count - 1
        assert mx.allclose(
            one[:, :, :used].astype(mx.float32), other[:, :, :used].astype(mx.float32), atol=1e-5
        ) or one.dtype == mx.uint32  # fmt: skip
    for a, b in zip(wanted, got, strict=True):
        for report, other_report in zip(a.logprobs, b.logprobs, strict=True):
            assert report.logprob == pytest.approx(other_report.logprob, abs=1e-4)


@pytest.mark.parametrize(
    "name", ["gemma2-caps", "gemma3-windows", "gpt-oss-small", "deepseek2-lite", "bloom-560m"]
)
def test_every_kind_of_layer(tmp_path: Path, name: str) -> None:
    model = model_of(name, tmp_path)
    wanted, _ = steps(model, GREEDY, NEVER, 24, {})
    got, _ = steps(model, GREEDY, 2, 24, {})
    assert [step.token for step in got] == [step.token for step in wanted]


@pytest.mark.parametrize("deterministic", [False, True])
def test_rows_come_and_go_beside_recordings(
    tiny: Transformer, monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    monkeypatch.setattr(stepping, "PATIENCE", 2)
    asks = [
        Ask(prompt, 5 + 7 * i, ELABORATE if i % 2 else GREEDY)
        for i, prompt in enumerate(prompts(6, 30, seed=3))
    ]
    wanted = [alone(tiny, ask) for ask in asks]
    service = Service(tiny, rows=4, deterministic=deterministic)
    for ask in asks:
        ask.submit(service, tiny)
    play(service)
    assert [ask.tokens for ask in asks] == wanted


def test_what_cannot_be_a_pure_function_is_not_recorded(tiny: Transformer, tmp_path: Path) -> None:
    stepper = Stepper(tiny)
    sparse = tiny.make_cache(caching(sparse=Blocks(4, 16)))
    tiny(mx.array([[3, 4]]), sparse)
    empty, dense = tiny.make_cache(), tiny.make_cache()
    tiny(mx.array([[3, 4]]), dense)
    assert stepper.rows(sparse) is None
    assert stepper.rows(empty) is None
    assert isinstance(stepper.rows(dense), DecodeRows)
    foreign = model_of("mamba2-130m", tmp_path)
    assert Stepper(foreign).rows(foreign.make_cache()) is None


def test_recordings_are_few_and_belong_to_a_thread(tiny: Transformer) -> None:
    """MLX aborts where a recording outlives the thread that made it."""
    stepper, seen = Stepper(tiny), []
    stepper.patience = 0

    def play_many() -> None:
        for length in range(2, 2 + KINDS + 3):
            rows = tiny.make_cache()
            tiny(mx.array([[3] * length]), rows)
            many = SamplingParams(temperature=0.5, seed=1, top_k=length)
            sampler = Sampler(many, tiny.vocab_size)
            drawing = stepper.alone(mx.array([4]), stepper.rows(rows), rows, sampler, 0)
            mx.eval(drawing.arrays)
        seen.append(len(stepper.recorded))

    thread = threading.Thread(target=play_many)
    thread.start()
    thread.join()
    assert seen == [KINDS]
    assert not stepper.recorded


def test_the_recording_that_was_used_least_recently_goes_first(
    tiny: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stepping, "KINDS", 2)
    stepper, made = Stepper(tiny), []
    for top_k in (2, 3, 2, 4):
        rows = tiny.make_cache()
        tiny(mx.array([[3, 5]]), rows)
        sampler = Sampler(SamplingParams(temperature=0.5, seed=1, top_k=top_k), tiny.vocab_size)
        stepper.patience = 0
        mx.eval(stepper.alone(mx.array([4]), stepper.rows(rows), rows, sampler, 0).arrays)
        made.append(next(reversed(stepper.recorded.values())))
    first, second, again, last = made
    assert first is again
    assert [id(one) for one in stepper.recorded.values()] == [id(first), id(last)]
    assert second is not last


def test_a_step_copies_no_capacity(tmp_path: Path) -> None:
    """What a recorded step allocates does not grow with what its caches hold.

    Of a model with few layers it may: MLX queues some hundred operations ahead, and while those of
    the step before still wait to read a cache, it is not written in place.
    """
    shape = Tiny(hidden=64, heads=2, kv_heads=1, ffn=48, layers=24, vocab=VOCABULARY + 160)
    tiny = load_model(read_gguf(shape.write(tmp_path / "x.gguf")), dtype="float32").model
    assert isinstance(tiny, Transformer)
    peaks = []
    for length in (300, 2000):
        session = Session(tiny.make_cache, owner=tiny)
        sampler = Sampler(GREEDY, tiny.vocab_size)
        stepper = Stepper(tiny)
        stepper.patience = 0
        tokens = np.full(length, 5).tolist()
        running = decode(stepper, session, sampler, prefill(tiny, session, tokens), 12)
        for _ in range(6):
            next(running)
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        for _ in range(4):
            next(running)
        mx.synchronize()
        peaks.append(mx.get_peak_memory() - before)
    one_layer = 2000 * 2 * 32 * 4
    assert peaks[1] - peaks[0] < one_layer
