"""Names of GGUF tensors against the parameters that stock mlx-lm builds."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlx.utils import tree_flatten
from oracle_models import SKELETONS, write_skeleton
from tiny_models import Tiny

from converters.architectures.mapping import ARCHITECTURES, architecture_of
from converters.gguf.reader import GGUFFile, read_gguf
from converters.gguf.source import open_gguf

BIASED = ("attn_q", "attn_k", "attn_v")
#: Architectures whose files keep the rows of queries and keys for the rotation of neighbors.
REORDERED = {"llama", "granite", "granitemoe", "internlm2", "mistral3", "mixtral", "smollm3"}


def assert_stock_parameters(file: GGUFFile) -> None:
    """Every parameter of mlx-lm's class is a target, of the same shape, and nothing else is."""
    from mlx_lm.utils import _get_classes

    model = open_gguf(file)
    config, names = model.config, model.names
    stock_class, arguments = _get_classes(config)
    stock = dict(tree_flatten(stock_class(arguments.from_dict(config)).parameters()))
    targets = {mapped.target for mapped in names.mapped} | {name for name, _ in names.zeros}
    if config["model_type"] == "gemma3_text":  # drops its head when weights without one arrive
        stock.pop("lm_head.weight")
    assert targets == set(stock)
    for mapped in names.mapped:
        assert stock[mapped.target].shape == mapped.shape
    for name, length in names.zeros:
        assert stock[name].shape == (length,)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_targets_are_the_parameters_of_the_stock_class(
    tmp_path: Path, arch: str, tied: bool
) -> None:
    model = Tiny(arch=arch, tied=tied, biases=BIASED if arch != "qwen3" else ())
    assert_stock_parameters(read_gguf(model.write(tmp_path / "x.gguf")))


@pytest.mark.parametrize("name", SKELETONS)
def test_targets_of_skeletons_are_the_parameters_of_the_stock_class(
    oracle: Path, tmp_path: Path, name: str
) -> None:
    assert_stock_parameters(read_gguf(write_skeleton(oracle, name, tmp_path / "x.gguf")))


def test_which_architectures_reorder_rows(oracle: Path, tmp_path: Path) -> None:
    queries_and_keys = {"attn_q", "attn_k"}
    for skeleton in SKELETONS:
        file = read_gguf(write_skeleton(oracle, skeleton, tmp_path / "x.gguf"))
        name = next(n for n, row in ARCHITECTURES.items() if row is architecture_of(file))
        moved = {
            m.source.name.split(".")[2] for m in open_gguf(file).names.mapped if m.order is not None
        }
        assert moved == (queries_and_keys if name in REORDERED else set()), skeleton


def test_biases_move_with_their_rows(tmp_path: Path) -> None:
    for arch, moves in (("llama", True), ("qwen2", False)):
        file = read_gguf(Tiny(arch=arch, biases=BIASED).write(tmp_path / "x.gguf"))
        moved = {
            m.source.name.split(".", 2)[-1]
            for m in open_gguf(file).names.mapped
            if m.order is not None
        }
        names = {"attn_q.weight", "attn_k.weight", "attn_q.bias", "attn_k.bias"}
        assert moved == (names if moves else set())


@pytest.mark.parametrize("number", ["00", "\u0660", "9" * 40])
def test_a_layer_has_one_spelling(
    tmp_path: Path, number: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A twin of a tensor must not take its place."""
    model, twin = Tiny(), f"blk.{number}.attn_q.weight"
    shapes = model.shapes() | {twin: (64, 64)}
    monkeypatch.setattr(model, "shapes", lambda: shapes)
    names = open_gguf(model.write(tmp_path / "x.gguf")).names
    targets = [mapped.target for mapped in names.mapped]
    assert len(set(targets)) == len(targets)
    assert [tensor.name for tensor, _ in names.skipped] == [twin]
