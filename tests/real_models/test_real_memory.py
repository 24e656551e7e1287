"""What a run takes at its peak is what ``mlxrun inspect`` has planned for it, or a little less."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from real_models import Figures

import mlxrun
from mlxrun.cli.inspection import inspect_model

# A run takes no more than the plan, and the plan no more than this many times what a run takes.
FACTOR = 1.1


@pytest.mark.parametrize(("prompt", "completion"), [(40, 8), (580, 4)])
def test_a_run_takes_the_planned_memory(
    llm: mlxrun.LLM,
    path: Path,
    figures: Figures,
    monkeypatch: pytest.MonkeyPatch,
    prompt: int,
    completion: int,
) -> None:
    tokens = figures.arrays["story"][:prompt].tolist()
    monkeypatch.setattr(llm.prefix_cache, "budget", 0)
    others = mx.get_active_memory() - (llm.model.nbytes - llm.model.mapped)
    got = llm.generate(tokens, max_tokens=completion, temperature=0, ignore_eos=True)
    peak = got.usage.peak_memory - others
    plan = inspect_model(path, context=prompt + completion)["plan"]
    planned = plan["weights"] + plan["sequence"] + plan["scratch"]
    assert plan["weights"] == llm.model.nbytes
    assert peak <= planned <= FACTOR * peak
