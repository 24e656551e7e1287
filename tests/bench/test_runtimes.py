"""Runs compute all of their tokens: nothing is reused from an earlier run."""

from __future__ import annotations

import pytest
from mlx_lm_models import CONFIGS, save, stock
from tiny_models import Tiny

import mlxrun
from mlxrun.bench.runtimes import MlxrunRuntime, SerialRuntime
from mlxrun.bench.workloads import Decode, FirstToken, Prefill, Ragged
from mlxrun.engine import model_runner as stepping
from mlxrun.engine.input import InputProcessor as Asker
from mlxrun.models.transformer import Transformer


@pytest.fixture
def llm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    return mlxrun.load(Tiny(keys={"context_length": 256}).write(folder / "tiny.gguf"))


@pytest.fixture
def computed(monkeypatch, llm):
    """Numbers of tokens of all passes."""
    passes: list[int] = []
    real = Transformer.hidden

    def hidden(self, tokens, cache, *args, **options):
        passes.append(tokens.size)
        return real(self, tokens, cache, *args, **options)

    monkeypatch.setattr(Transformer, "hidden", hidden)
    monkeypatch.setattr(stepping, "COMPILE_AFTER", 1 << 30)  # replays of recordings do not call it
    return passes


# A pass for each sampled token, none for the last one. A sequence that ends before its neighbors
# leaves an idle row, which is computed for a while.
WORK = [
    (MlxrunRuntime, Prefill(40), 40, 0),
    (MlxrunRuntime, Prefill(40, 64), 40, 0),
    (MlxrunRuntime, Decode(5), 5, 0),
    (MlxrunRuntime, Decode(5, 64), 5, 0),
    (MlxrunRuntime, Ragged((40, 50), (3, 4)), 40 + 50 + 2 + 3, 4),
    (SerialRuntime, Ragged((40, 50), (3, 4)), 40 + 50 + 2 + 3, 0),
    (MlxrunRuntime, FirstToken(6), 6, 0),
]


@pytest.mark.parametrize(("kind", "workload", "tokens", "idle"), WORK)
def test_every_run_computes_all_of_its_tokens(llm, computed, kind, workload, tokens, idle):
    runtime = kind(llm, 0.0)
    assert runtime.can(workload)
    runtime.run(workload)
    for _ in range(2):
        computed.clear()
        run = runtime.run(workload)
        assert tokens <= sum(computed) <= tokens + idle
        assert run.seconds > 0
        assert llm.model.nbytes <= run.average <= run.peak


def test_a_short_request_comes_during_the_prefill_of_a_long_one(llm, computed):
    runtime = MlxrunRuntime(llm, 0.0)
    runtime.run(FirstToken(6, 200))
    assert 6 < sum(computed) <= 206


@pytest.mark.parametrize("context", [0, 30])
def test_sequences_decode_in_joint_passes(llm, computed, context):
    runtime = MlxrunRuntime(llm, 0.0)
    runtime.run(Decode(8, context, 3))
    computed.clear()
    run = runtime.run(Decode(8, context, 3))
    assert computed == [3] * 8
    alone = runtime.run(Decode(8, context))
    assert run.kv_bytes == 3 * alone.kv_bytes


@pytest.mark.parametrize("name", ["helium", "mamba2"])
def test_sequences_that_decode_apart_have_keys_and_values_too(tmp_path, name):
    llm = mlxrun.load(save(tmp_path / name, CONFIGS[name], stock(CONFIGS[name])))
    runtime = MlxrunRuntime(llm, 0.0)
    alone, together = runtime.run(Decode(5)), runtime.run(Decode(5, parallel=3))
    assert together.kv_bytes == 3 * alone.kv_bytes > 0


def test_types_of_cache(llm):
    plain, packed = (
        MlxrunRuntime(llm, 0.0),
        MlxrunRuntime(llm, 0.0, {"cache_type_k": "q8/32", "cache_type_v": "q4/32"}),
    )
    assert packed.about.removeprefix(plain.about) == ", cache type k q8/32, cache type v q4/32"
    for workload in (Prefill(40, 64), Decode(5, 64), Decode(5, 64, 3)):
        assert 0 < 2 * packed.run(workload).kv_bytes < plain.run(workload).kv_bytes


def test_sequences_run_together_however_short(llm, computed):
    runtime = MlxrunRuntime(llm, 0.0)
    alone = runtime.run(Decode(2)).kv_bytes
    computed.clear()
    assert runtime.run(Decode(2, parallel=150)).kv_bytes == 150 * alone
    assert computed == [150, 150]


def test_a_models_recommended_sampling_is_not_measured(tmp_path, monkeypatch):
    asked = []
    real = Asker.request

    def request(self, *args, **options):
        asked.append(real(self, *args, **options))
        return asked[-1]

    monkeypatch.setattr(Asker, "request", request)
    recommended = {"general.sampling.penalty_repeat": 1.5}
    made = Tiny(keys={"context_length": 256}, general=recommended).write(tmp_path / "x.gguf")
    llm = mlxrun.load(made)
    for kind, workload, _, _ in WORK:
        kind(llm, 0.0).run(workload)
    assert {request.params for request in asked} == {mlxrun.SamplingParams(temperature=0)}
