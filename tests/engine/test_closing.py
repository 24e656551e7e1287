"""An engine that ends, whatever goes wrong meanwhile: all callers are notified, nothing is kept."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE
from tiny_models import Tiny

import mlxrun
from mlxrun.errors import EngineClosedError

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
PROMPT = list(range(3, 103))


class BrokenError(Exception):
    """An error that no engine expects."""


@pytest.fixture
def llm(tmp_path: Path) -> mlxrun.LLM:
    return mlxrun.load(Tiny(hidden=32, ffn=48).write(tmp_path / "x.gguf"))


def fail_after(call: Callable[..., Any], calls: int) -> Callable[..., Any]:
    """The same, but for every call after so many."""
    left = iter(range(calls))

    def failing(*given: Any, **options: Any) -> Any:
        if next(left, None) is None:
            raise BrokenError("broken")
        return call(*given, **options)

    return failing


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_close_that_fails_reaches_all_callers(
    llm: mlxrun.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = llm.engine(parallel=2)
    handles = [engine.submit(PROMPT, max_tokens=400, **GREEDY) for _ in range(4)]
    next(iter(handles[0]))
    monkeypatch.setattr(engine.runner, "caches_of", fail_after(engine.runner.caches_of, 0))
    engine.close()
    for handle in handles:
        with pytest.raises(BrokenError):
            handle.result(PATIENCE)
    with pytest.raises(EngineClosedError):
        engine.submit(PROMPT)
    llm.prefix_cache.clear()
    assert llm.prefix_cache.nbytes == 0


def test_a_step_that_fails_leaves_nothing_in_use(
    llm: mlxrun.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm.generate(PROMPT, session=llm.session(), max_tokens=1, **GREEDY)
    engine = llm.engine(parallel=2)
    monkeypatch.setattr(engine.runner, "run", fail_after(engine.runner.run, 3))
    handles = [engine.submit([*PROMPT, i], max_tokens=400, **GREEDY) for i in range(3, 6)]
    for handle in handles:
        with pytest.raises(BrokenError):
            handle.result(PATIENCE)
    engine.close()
    del engine, handle, handles
    gc.collect()
    assert llm.prefix_cache.figures.hits
    llm.prefix_cache.clear()
    assert llm.prefix_cache.nbytes == 0
