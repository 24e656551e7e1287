"""Names of GGUF tensors against the parameters that stock mlx-lm builds."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlx.utils import tree_flatten
from tiny_models import Tiny

from converters.gguf.config import model_config
from converters.gguf.names import ARCHITECTURES, map_names
from converters.gguf.reader import read_gguf

BIASED = ("attn_q", "attn_k", "attn_v")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_targets_are_the_parameters_of_the_stock_class(
    tmp_path: Path, arch: str, tied: bool
) -> None:
    from mlx_lm.utils import _get_classes

    model = Tiny(arch=arch, tied=tied, biases=BIASED if arch != "qwen3" else ())
    file = read_gguf(model.write(tmp_path / "x.gguf"))
    config, names = model_config(file), map_names(file)
    stock_class, arguments = _get_classes(config)
    stock = dict(tree_flatten(stock_class(arguments.from_dict(config)).parameters()))
    targets = {mapped.target for mapped in names.mapped} | {name for name, _ in names.zeros}
    assert targets == set(stock)
    for mapped in names.mapped:
        assert stock[mapped.target].shape == mapped.source.shape
    for name, length in names.zeros:
        assert stock[name].shape == (length,)


def test_only_llama_reorders_rows(tmp_path: Path) -> None:
    for arch in ARCHITECTURES:
        biases = BIASED if arch != "qwen3" else ()
        file = read_gguf(Tiny(arch=arch, biases=biases).write(tmp_path / "x.gguf"))
        moved = {m.source.name.split(".", 2)[-1] for m in map_names(file).mapped if m.permuted}
        queries_and_keys = {"attn_q.weight", "attn_k.weight", "attn_q.bias", "attn_k.bias"}
        assert moved == (queries_and_keys if arch == "llama" else set())


@pytest.mark.parametrize("number", ["00", "\u0660", "9" * 40])
def test_a_layer_has_one_spelling(
    tmp_path: Path, number: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A twin of a tensor must not take its place."""
    model, twin = Tiny(), f"blk.{number}.attn_q.weight"
    shapes = model.shapes() | {twin: (64, 64)}
    monkeypatch.setattr(model, "shapes", lambda: shapes)
    names = map_names(read_gguf(model.write(tmp_path / "x.gguf")))
    targets = [mapped.target for mapped in names.mapped]
    assert len(set(targets)) == len(targets)
    assert [tensor.name for tensor, _ in names.skipped] == [twin]
