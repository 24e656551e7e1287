"""Other ways than rotation to know positions: what conformance does not ask of them."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from cache_configs import caching
from conformance.measure import load
from conformance.skeleton import read

from mlxrun.errors import CacheError


@pytest.mark.parametrize("name", ["bloom-six", "refact-mqa"])
def test_a_model_with_alibi_cannot_evict(tmp_path: Path, name: str) -> None:
    model = load(read(name).write(tmp_path / "x.gguf")).model
    with pytest.raises(CacheError, match="ALiBi"):
        model.make_cache(caching(window=8))


def test_past_the_last_learned_position_the_last_one_stays(tmp_path: Path) -> None:
    model = load(read("gpt2-small").write(tmp_path / "x.gguf")).model
    assert model.context_length == 96
    logits = model(mx.array([[5] * 100]), model.make_cache())
    assert np.isfinite(np.array(logits)).all()
