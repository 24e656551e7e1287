"""Skeletons as files: patterns over layers, kinds of keys, values by rule, and stale logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from hypothesis import given
from hypothesis import strategies as st

from . import skeleton as skeletons
from .peer import draft
from .skeleton import Skeleton, SkeletonError, random_values

TINY = Skeleton(
    "tiny",
    "some",
    keys={"block_count": 5, "float": 0.5, "on": True, "signed": -1, "explicit": {"i32": [1, 2]}},
    tensors={
        "token_embd.weight": [40, 6],
        "blk.*.a.weight": [3],
        "blk.0,2-3.b.weight": ["F16", 4, 6],
    },
    values={"blk.2.*": {"constant": 2}},
)


def test_patterns_name_layers() -> None:
    shapes = TINY.shapes()
    assert [name for name in shapes if ".a." in name] == [f"blk.{i}.a.weight" for i in range(5)]
    assert {name: shapes[name] for name in shapes if ".b." in name} == {
        f"blk.{i}.b.weight": ("F16", (4, 6)) for i in (0, 2, 3)
    }


def test_a_tensor_is_described_once() -> None:
    twice = replace(TINY, tensors={**TINY.tensors, "blk.4.a.weight": [3]})
    with pytest.raises(SkeletonError, match=r"blk\.4\.a\.weight is there twice"):
        twice.shapes()


def test_the_file_has_keys_of_the_kinds_asked_for_and_is_always_the_same(tmp_path: Path) -> None:
    first, again = TINY.write(tmp_path / "1.gguf"), TINY.write(tmp_path / "2.gguf")
    assert first.read_bytes() == again.read_bytes()
    fields = GGUFReader(first).fields
    kinds = {key: [kind.name for kind in field.types] for key, field in fields.items()}
    assert kinds["some.block_count"] == ["UINT32"]
    assert kinds["some.float"] == ["FLOAT32"]
    assert kinds["some.on"] == ["BOOL"]
    assert kinds["some.signed"] == ["INT32"]
    assert kinds["some.explicit"] == ["ARRAY", "INT32"]
    assert len(fields["tokenizer.ggml.tokens"].data) == TINY.vocabulary == 40


def test_values_follow_the_first_rule_that_fits_and_can_be_zero(tmp_path: Path) -> None:
    tensors = {t.name: t.data for t in GGUFReader(TINY.write(tmp_path / "x.gguf")).tensors}
    assert np.all(tensors["blk.2.a.weight"] == 2)
    assert tensors["blk.0.b.weight"].dtype == np.float16
    assert not np.array_equal(tensors["blk.0.b.weight"], tensors["blk.3.b.weight"])
    zeroed = TINY.write(tmp_path / "zero.gguf", zero="blk.0,2-3.b.weight")
    for tensor in GGUFReader(zeroed).tensors:
        changed = tensor.name in TINY.expand("blk.0,2-3.b.weight")
        assert np.array_equal(tensor.data, 0 * tensors[tensor.name]) == changed, tensor.name


@given(st.floats(0.1, 10), st.floats(0.1, 10), st.sampled_from([-1, 1]))
def test_rules_keep_their_bounds(one: float, other: float, sign: int) -> None:
    low, high = sorted((one, other))
    for rule in (
        {"uniform": sorted((sign * low, sign * high))},
        {"log": [sign * low, sign * high]},
    ):
        found = sign * random_values(rule, (50,), np.random.default_rng(0))
        assert np.all((found >= low - 1e-9) & (found <= high + 1e-9)), rule


def test_an_unknown_rule_is_an_error() -> None:
    with pytest.raises(SkeletonError, match="no such rule"):
        random_values({"gauss": [0, 1]}, (2,), np.random.default_rng(0))


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"tokens": 8}, {"keys": {"block_count": 5}}, {"values": {}}]
)
def test_logits_of_another_skeleton_are_refused(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(skeletons, "LOGITS", tmp_path)
    with pytest.raises(SkeletonError, match="has no logits"):
        skeletons.expected(TINY)
    logits = np.ones((2, 3), np.float32)
    np.savez_compressed(tmp_path / "tiny.npz", logits=logits, skeleton=np.array(TINY.digest()))
    assert np.array_equal(skeletons.expected(replace(TINY, about="changes nothing")), logits)
    with pytest.raises(SkeletonError, match="has changed since"):
        skeletons.expected(replace(TINY, **change))


def test_drafts_can_be_read(oracle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skeletons, "SKELETONS", tmp_path)
    for listing in sorted((oracle / "peer").glob("*.json")):
        (tmp_path / listing.name).write_text(draft(listing))
        assert "token_embd.weight" in skeletons.read(listing.stem).shapes(), listing.name
