"""mlx-lm as a baseline: the same weights in the same form, or a typed error."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from tiny_models import Tiny

import mlxrun
from mlxrun.bench.baselines import mlx_lm_runtime
from mlxrun.bench.workloads import Decode, Prefill
from mlxrun.errors import BaselineError, MemoryLimitError

WIDE = {"hidden": 64, "ffn": 128, "kinds": {"*": "Q8_0"}, "keys": {"context_length": 64}}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return Tiny(**WIDE).write(tmp_path_factory.mktemp("baseline") / "tiny.gguf")


# A checkpoint under the policy near holds scales and plain tensors in half precision, 2e-4 apart.
@pytest.mark.parametrize(("policy", "error"), [(None, 1e-5), ("near", 2e-3)])
def test_the_same_weights_in_the_same_form(source, policy, error):
    llm = mlxrun.load(source, policy=policy)
    ids = [5, 6, 7, 8]
    with mlx_lm_runtime(llm, source) as baseline:
        # It has no GGUF blocks: it gets their weights as plain floats.
        nbytes = llm.model.nbytes if policy else 4 * llm.report.elements
        assert baseline.about == f"float32, {nbytes / 1e6:.1f} MB of weights"
        theirs = baseline._model(mx.array([ids]))[0]
        assert mx.abs(llm.logits(ids) - theirs).max().item() < error
        for workload in (Prefill(8, 16), Decode(3, 16), Decode(3, 16, 2)):
            run = baseline.run(workload)
            assert run.seconds > 0
            assert run.kv_bytes > 0


def test_a_directory_as_it_is(source, tmp_path):
    mlxrun.convert(source, tmp_path / "made")
    llm = mlxrun.load(tmp_path / "made")
    with mlx_lm_runtime(llm, tmp_path / "made") as baseline:
        assert baseline.run(Decode(2)).seconds > 0
    assert (tmp_path / "made").is_dir()


def test_a_failure_of_mlx_is_one_line(source, monkeypatch):
    def fails(*args, **options):
        raise RuntimeError("[malloc] Unable to allocate\n" + "bytes " * 1000)

    monkeypatch.setattr("mlxrun.bench.baselines.generate_step", fails)
    llm = mlxrun.load(source)
    with mlx_lm_runtime(llm, source) as baseline, pytest.raises(BaselineError) as caught:
        baseline.run(Prefill(8))
    assert str(caught.value).startswith("mlx-lm failed in pp8: [malloc] Unable to allocate bytes")
    assert "without --against mlx-lm" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_no_room_for_a_second_copy(source, monkeypatch):
    llm = mlxrun.load(source)
    monkeypatch.setenv("MLXRUN_MEMORY_LIMIT", "1K")
    with pytest.raises(MemoryLimitError, match="a second copy"), mlx_lm_runtime(llm, source):
        pass
