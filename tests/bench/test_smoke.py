"""Every option of ``mlxrun bench`` once, at tiny sizes: it runs to its end. No times.

The options' effects are tested where they are defined; CI runs no other benchmarks.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlxrun.analysis import device
from mlxrun.bench.runtimes import MlxrunRuntime
from mlxrun.cli.bench import bench_command

SMALL = ("--n-prompt", "8", "--n-predict", "4", "--repetitions", "1")
# Options that other commands have too are tested there; a model of random weights has no adapter.
ELSEWHERE = {"--adapter", "--wired", "--help"}

LLAMA_BENCH = """#!/bin/sh
echo '[{"samples_ns": [1000000], "build_commit": "made up"}]'
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a data set, a stand-in for llama-bench on the path, and room for pictures."""
    text = "".join(
        json.dumps({"prompt": "a" * (i + 1), "response": "b" * (2 * i + 1)}) + "\n"
        for i in range(20)
    )
    (tmp_path / "chats.jsonl").write_text(text)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "llama-bench").write_text(LLAMA_BENCH)
    (tmp_path / "llama-bench").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    for name, small in (("CPU_SIDE", 64), ("GPU_SIDE", 64), ("RUNS", 1)):
        monkeypatch.setattr(device, name, small)
    return tmp_path


RUNS = (
    (*SMALL, "--parallel", "1,2", "--context", "0,16", "--plot", "rates.svg"),
    (
        *(*SMALL, "--parallel", "2", "--ragged"),
        *("--against", "mlx-lm", "--against", "llama-bench", "--csv"),
    ),
    (*SMALL, "--json", "--verbose", "--products", "fast"),
    (
        *(*SMALL, "--parallel", "2", "--context", "0,48", "--attention", "strided:16/4"),
        *("--cache-type-k", "q8/32", "--cache-type-v", "f16", "--ragged"),
    ),
    (*SMALL, "--dtype", "float16", "--policy", "near", "--roofline"),
    ("--dataset", "chats.jsonl", "--repetitions", "1"),
    (
        *("--dataset", "chats.jsonl", "--run", "conservative", "--parallel", "2", "-r", "1"),
        *("--against", "mlx-lm", "--json", "--plot", "rates.html"),
    ),
)


@pytest.mark.parametrize("options", RUNS, ids=lambda options: " ".join(options[-3:]))
def test_it_runs(bench, folder, options):
    result = bench(*options)
    assert result.code == 0, result.err
    assert result.out
    assert not {"error:", "warning:"} & set(result.err.split())
    for place, option in enumerate(options):
        if option == "--plot":
            assert (folder / options[place + 1]).stat().st_size > 1000
    if "--json" in options:
        assert json.loads(result.out)["results"]


def test_every_option_is_run_here_or_elsewhere():
    there = {
        next(o for o in p.opts if o.startswith("--"))
        for p in bench_command.params
        if p.opts[0][0] == "-"
    }
    assert there == {option for run in RUNS for option in run if option.startswith("--")} | (
        there & ELSEWHERE
    )


def test_the_recommendation_of_a_data_set_is_measured(bench, folder):
    ran = ("--run", "recommended", "--parallel", "4", "-r", "1", "--json")
    result = bench("--dataset", "chats.jsonl", *ran)
    found = json.loads(result.out)
    levels, tests = found["dataset"]["levels"], {one["test"] for one in found["results"]}
    chosen = levels["recommended"]
    prompt, predict = chosen["size"]["prompt"], chosen["size"]["predict"]
    assert {f"pp{prompt}", f"tg{predict} @ d{prompt}"} <= tests
    offline = chosen["workers"]["offline"]
    assert offline == 1 or f"tg{predict} x{offline} @ d{prompt}" in tests
    assert found["dataset"]["exchanges"] == found["dataset"]["outputs"]["count"] == 20
    assert (
        found["dataset"]["outputs"]["longest"] >= found["dataset"]["prompts"]["percentiles"]["50"]
    )


def test_its_tables(bench, folder):
    out = bench("--dataset", "chats.jsonl", "-r", "1", "--parallel", "2").out
    assert out.startswith("Tokens of 20 exchanges in chats.jsonl")
    for part in ("conservative", "recommended", "comprehensive", "99%", "Workers, of 1, 2:"):
        assert part in out


def test_one_sequence_alone_is_tried_where_that_is_asked_for(bench, folder):
    out = bench("--dataset", "chats.jsonl", "-r", "1", "--parallel", "1").out
    assert "Workers, of 1:" in out


@pytest.mark.parametrize(
    "options",
    [
        ("--run", "recommended"),
        ("--attention", "some"),
        ("--dataset", "chats.jsonl", "--n-prompt", "8"),
        ("--dataset", "chats.jsonl", "--ragged"),
        ("--dataset", "chats.jsonl", "--csv"),
        ("--dataset", "chats.jsonl", "--against", "mlx-lm"),
        ("--dataset", "missing.jsonl"),
        ("--dataset", "."),
        ("--run", "all", "--dataset", "chats.jsonl"),
    ],
)
def test_wrong_usage(bench, folder, options):
    result = bench(*options)
    assert (result.code, result.out) == (2, "")
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--plot", "rates.gif"), "error: --plot must be a file that ends in"),
        (("--plot", "none/rates.png"), "error: --plot must be in a folder that is there"),
        (("--dataset", "llama-bench"), "error: llama-bench, line 1: no JSON"),
        (("--dataset", "empty.jsonl"), "error: empty.jsonl: there is no prompt in it"),
    ],
)
def test_errors_before_a_model_is_loaded(bench, folder, monkeypatch, options, message):
    monkeypatch.setattr("mlxrun.cli.bench.load_model", lambda *_, **__: pytest.fail("loaded"))
    result = bench(*options)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(message)
    assert result.err.count("\n") == 1


def test_a_data_set_longer_than_the_context(bench, folder):
    line = json.dumps({"prompt": "a " * 300, "response": "b"})
    (folder / "long.jsonl").write_text(line)
    profile = bench("--dataset", "long.jsonl", "-r", "1", "--parallel", "2")
    assert profile.code == 0
    assert "Longer than the model's context of 192 tokens: conservative (" in profile.out
    run = bench("--dataset", "long.jsonl", "-r", "1", "--parallel", "2", "--run", "recommended")
    assert run.code == 1
    assert run.err.startswith("error: pp")


def test_an_interrupt_while_numbers_are_tried(bench, folder, monkeypatch):
    def run(self, workload):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlxrun.bench.runtimes.MlxrunRuntime.run", run)
    chosen = ("--dataset", "chats.jsonl", "--run", "recommended", "--against", "mlx-lm")
    result = bench(*chosen, "--plot", "rates.png")
    assert result.code == 130
    assert result.err.splitlines() == ["interrupted", "nothing was measured to plot in rates.png"]
    assert "Tokens of 20 exchanges" in result.out
    assert "Interrupted" in result.out


def test_an_interrupt_before_all_numbers_were_tried(bench, folder, monkeypatch):
    whole = MlxrunRuntime.run

    def run(self, workload):
        if workload.parallel == 4:
            raise KeyboardInterrupt
        return whole(self, workload)

    monkeypatch.setattr(MlxrunRuntime, "run", run)
    options = ("--dataset", "chats.jsonl", "-r", "1", "--parallel", "2,4")
    found = json.loads(bench(*options, "--json").out)
    assert {one["test"].split(" @")[0] for one in found["results"]} == {"tg32", "tg32 x2"}
    assert [level["workers"] for level in found["dataset"]["levels"].values()] == [None] * 3
    assert "Workers, of" not in bench(*options).out
