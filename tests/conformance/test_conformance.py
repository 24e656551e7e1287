"""Every skeleton against llama.cpp's logits, however its tokens are put through the caches."""

from __future__ import annotations

from pathlib import Path

import pytest

from .measure import SAME, left_out, load, measure, on_cpu
from .skeleton import LOGITS, SKELETONS, expected, names, read


@pytest.mark.parametrize("name", names())
def test_logits_are_llama_cpps(name: str, tmp_path: Path) -> None:
    skeleton = read(name)
    with on_cpu():
        loaded = load(skeleton.write(tmp_path / f"{name}.gguf"))
        found = measure(loaded, skeleton.token_ids(), expected(skeleton))
    assert left_out(loaded) == []
    assert {way: value for way, value in found.items() if not value <= SAME} == {}


def test_every_skeleton_has_its_logits_and_the_other_way_round() -> None:
    assert names(), SKELETONS
    assert sorted(path.stem for path in LOGITS.glob("*.npz")) == names()
