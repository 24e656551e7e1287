"""``bench --roofline`` and the costs that ``inspect`` shows, at tiny sizes. No times."""

from __future__ import annotations

import json

import pytest
from conformance.skeleton import read

from mlxrun.analysis import device
from mlxrun.analysis.chips import CHIPS

SMALL = ("--n-prompt", "8", "--n-predict", "4", "--repetitions", "1", "--parallel", "2")


@pytest.fixture(autouse=True)
def small_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "CPU_BYTES", 1 << 20)
    monkeypatch.setattr(device, "last_cache", lambda: 0)
    monkeypatch.setattr(device, "CPU_SIDE", 64)
    monkeypatch.setattr(device, "GPU_BYTES", 1 << 20)
    monkeypatch.setattr(device, "GPU_SIDE", 64)


def test_tables(mlxrun_cli, model):
    result = mlxrun_cli("bench", model, *SMALL, "--roofline")
    assert (result.code, result.err) == (0, "")
    assert "Against the limits of this device" in result.out
    assert "Bounds, not measured" in result.out
    rows = {line.split("  ")[0]: line for line in result.out.splitlines()}
    for chip in CHIPS:
        assert chip.name in rows
    assert rows["M4"].split()[2] == "-"
    assert rows["M1 Pro"].split()[3].startswith("~")


def test_json(mlxrun_cli, model, llm):
    result = mlxrun_cli("bench", model, *SMALL, "--context", "0,16", "--roofline", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)["roofline"]
    names = ["pp8", "tg4", "tg4 x2"]
    assert [test["test"] for test in found["tests"]] == names + [f"{n} @ d16" for n in names]
    for test in found["tests"]:
        assert test["limit"]["binds"] in ("bandwidth", "compute")
        assert test["fraction"] == test["tokens_per_second"] / test["limit"]["rate"] > 0
        assert test["bytes"] > test["weights_read"] > 0
    assert found["weights"]["total"] == llm.model.nbytes
    assert found["unknown"] == []
    chips = found["elsewhere"]["chips"]
    assert [chip["chip"] for chip in chips] == [chip.name for chip in CHIPS]
    assert all(chip["source"].startswith("https://") for chip in chips)


def test_other_caches_and_attention_read_less(mlxrun_cli, model):
    deep = ("bench", model, *SMALL, "--context", "128", "--roofline", "--json")
    plain = json.loads(mlxrun_cli(*deep).out)["roofline"]["tests"]
    given = ("--cache-type-k", "f16", "--cache-type-v", "f16", "--attention", "strided:16/8")
    sparse = json.loads(mlxrun_cli(*deep, *given).out)["roofline"]["tests"]
    for before, after in zip(plain, sparse, strict=True):
        by = 2 if after["test"].startswith("pp") else 4
        assert after["weights_read"] == before["weights_read"]
        assert by * after["cache_read"] <= before["cache_read"]


def test_without_it_the_device_is_not_measured(mlxrun_cli, model, monkeypatch):
    monkeypatch.setattr(device, "measure_device", None)
    result = mlxrun_cli("bench", model, *SMALL, "--json")
    assert result.code == 0
    assert "roofline" not in json.loads(result.out)


def test_options_that_exclude_each_other(mlxrun_cli, model):
    result = mlxrun_cli("bench", model, *SMALL, "--roofline", "--csv")
    assert (result.code, result.out) == (2, "")


def test_inspect_shows_the_cost_of_a_token(mlxrun_cli, model):
    result = mlxrun_cli("inspect", model, "--context", "100", "--parallel", "4", "--json")
    work = json.loads(result.out)["work"]
    assert (work["here"], work["elsewhere"]) == (None, None)
    decode, prefill = work["works"]["decode"], work["works"]["prefill"]
    assert (decode["tokens"], prefill["tokens"]) == (4, 100)
    assert decode["weights_read"] <= work["weights"]["total"]
    longer = mlxrun_cli("inspect", model, "--context", "200", "--parallel", "4", "--json")
    further = json.loads(longer.out)["work"]["works"]["decode"]
    assert further["cache_read"] == 2 * decode["cache_read"]
    packed = mlxrun_cli("inspect", model, "--context", "100", "--cache-type-k", "f16",
                        "--cache-type-v", "f16", "--json")  # fmt: skip
    halved = json.loads(packed.out)["work"]["works"]["decode"]
    assert 8 * halved["cache_read"] == decode["cache_read"]


def test_inspect_with_chips(mlxrun_cli, model):
    chips = ("--chip", "M1 Pro", "--chip", "h100", "--chip", "here")
    result = mlxrun_cli("inspect", model, *chips)
    assert (result.code, result.err) == (0, "")
    assert "This device was measured" in result.out
    rows = result.out[result.out.index("Limits of other chips") :].splitlines()
    assert [row.split("  ")[0] for row in rows[2:4]] == ["M1 Pro", "H100"]


def test_an_unknown_chip_is_refused_before_a_model_is_looked_for(mlxrun_cli):
    result = mlxrun_cli("inspect", "nobody/nothing", "--chip", "h100", "--chip", "m1-por")
    assert (result.code, result.out) == (2, "")
    assert "m1-pro" in result.err


def test_a_class_of_mlx_lms(mlxrun_cli, tmp_path):
    path = read("qwen3next-80b").write(tmp_path / "x.gguf")
    result = mlxrun_cli("inspect", path, "--chip", "m1-pro", "--chip", "here")
    assert (result.code, result.err) == (0, "")
    assert "Not known of this class of model: operations" in result.out
    row = next(line for line in result.out.splitlines() if line.startswith("M1 Pro"))
    *_, decode, prefill = row.split()
    assert decode.endswith("?")
    assert prefill == "-"
