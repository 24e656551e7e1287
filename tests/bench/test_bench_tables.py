"""Tables for people, of made-up measurements."""

from __future__ import annotations

import pytest

from mlxrun.bench.report import facts
from mlxrun.bench.runner import Results, Run
from mlxrun.bench.workloads import Decode, FirstToken, Prefill, Ragged
from mlxrun.cli.bench_tables import print_results

ABOUT = {
    "machine": {
        "date": "2026-01-01",
        "device": "CPU",
        "processor": "a processor",
        "cores": 2,
        "system": "Linux",
        "blas": "a BLAS",
        "versions": {"mlxrun": "1", "mlx": "2"},
    },
    "other_use": {
        "load_before": 3.0,
        "load_highest": 4.0,
        "cores": 2,
        "cores_used": 1.5,
        "busy": [
            {"name": "a compiler", "cores": 1.26, "processes": 3},
            {"name": "an editor", "cores": 0.1, "processes": 1},
        ],
        "others_used": 1.4,
        "shared": True,
    },
    "runtimes": [
        {"name": "mlxrun", "about": "float32", "load_seconds": 1.25},
        {"name": "llama-bench", "about": "as in the file", "load_seconds": None},
    ],
    "room": [
        {"parallel": 2, "context": 2048},
        {"parallel": 4, "context": 2048},
        {"parallel": 20, "context": 90},
    ],
    "left_out": {"context": ["pp512"], "memory": ["tg8 x20", "tg9 x20"]},
    "interrupted": False,
}


@pytest.fixture
def shown(capsys):
    """The lines that are printed of results."""

    def call(*measured, **about) -> list[str]:
        results = Results()
        for workload, runtime, seconds in measured:
            results.add(workload, runtime, Run(seconds, 2_000_000, 5_000_000, 3_000_000))
        print_results(facts(results, ABOUT | about))
        return capsys.readouterr().out.splitlines()

    return call


def cells(lines: list[str], start: str) -> list[str]:
    (line,) = (line for line in lines if line.startswith(f"{start}  "))
    return [cell for cell in line.split("  ") if cell]


def test_one_sequence(shown):
    lines = shown((Prefill(100), "mlxrun", 0.5), (Decode(10), "mlxrun", 2.0))
    assert lines[0] == "One sequence"
    memory = [" 2 MB", " 3 MB", " 5 MB"]
    sizes = [cell.strip() for cell in memory]
    assert [c.strip() for c in cells(lines, "pp100")] == [
        "pp100",
        "200",
        "200-200",
        "500 ms",
        *sizes,
    ]
    assert [c.strip() for c in cells(lines, "tg10")] == ["tg10", "5", "5-5", "200 ms", *sizes]
    assert "Sequences together" not in lines
    assert not any("M1 Pro" in line for line in lines)


def test_sequences_together_next_to_the_reference(shown):
    lines = shown((Decode(10), "mlxrun", 2.0), (Decode(10, 0, 8), "mlxrun", 4.0))
    found = [c.strip() for c in cells(lines, "tg10 x8")]
    assert found == ["tg10 x8", "8", "20", "20-20", "2.5", "4.00x", "50%", "2 MB", "5 MB", "2.12x"]
    assert any("llama.cpp, Qwen2-1.5B Q4_K_M on an M1 Pro" in line for line in lines)


def test_baselines(shown):
    lines = shown((Prefill(10), "mlxrun", 1.0), (Prefill(10), "mlx-lm", 3.0))
    assert lines[1].endswith("x mlx-lm")
    ours, theirs = lines[2:4]
    assert ours.split()[:2] == ["pp10", "mlxrun"]
    assert ours.endswith("3.00x")
    assert theirs.split()[:2] == ["pp10", "mlx-lm"]
    assert theirs.endswith("5 MB")


def test_mixed_requests(shown):
    lines = shown(
        (Ragged((1, 2), (10, 20)), "mlxrun", 2.0),
        (FirstToken(4), "mlxrun", 0.1),
        (FirstToken(4, 90), "mlxrun", 0.15),
    )
    assert [c.strip() for c in cells(lines, "ragged2")] == ["ragged2", "15", "15-15", "2 s"]
    late = [c.strip() for c in cells(lines, "first4 behind 90")]
    assert late == ["first4 behind 90", "150 ms", "1.50x"]


def test_notes(shown):
    lines = shown((Prefill(10), "mlxrun", 1.0))
    text = "\n".join(lines)
    for part in (
        "CPU (a processor, 2 cores), Linux, BLAS: a BLAS, 2026-01-01",
        "mlxrun 1, mlx 2",
        "mlxrun: float32, loaded in 1.25 s",
        "llama-bench: as in the file",
        "Load average 3.0 before, up to 4.0 during; this process used 1.5 of 2 cores.",
        "Also busy, in cores: a compiler 1.3 (3 processes), an editor 0.1; 1.4 in all.",
        "Other programs used this machine",
        "Tokens that memory has room for: 2048 in each of 2, 4; 90 in each of 20 sequences.",
        "Left out, longer than the model's context: pp512.",
        "Left out, more than memory holds: tg8 x20, tg9 x20.",
    ):
        assert part in text
    assert "Interrupted" not in text
    assert "Interrupted" in "\n".join(shown(interrupted=True))


def test_a_system_that_tells_no_load(shown):
    silent = {**ABOUT["other_use"], "load_before": None, "busy": [], "shared": False}
    lines = shown(other_use=silent)
    assert not any("Load" in line or "busy" in line for line in lines)
