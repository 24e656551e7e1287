"""A GGUF on the CPU: its matrices stay the blocks of the file, which is mapped."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from tiny_models import Tiny, nmse

import mlxrun
from converters.gguf.reader import GGMLType, read_gguf
from converters.gguf.source import open_gguf
from mlxrun import products
from mlxrun.cli.main import run
from mlxrun.errors import NumericError, ParameterError
from mlxrun.kernels import dispatch as kernels
from mlxrun.loader import Loaded, load_model, why_not_blocks

TOKENS = np.random.default_rng(3).integers(3, 288, 40).tolist()
WIDE = Tiny(hidden=256, ffn=512)
KINDS = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K",
    "Q6_K", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "IQ4_NL", "IQ4_XS",
    "Q1_0", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4",
)  # fmt: skip


def logits(loaded: Loaded) -> np.ndarray:
    model = loaded.model
    return np.array(model(mx.array([TOKENS]), model.make_cache())[0])


def loaded(path: Path, **options: Any) -> Loaded:
    return load_model(read_gguf(path), **options)


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_stays_as_it_is(tmp_path: Path, kind: str) -> None:
    path = replace(WIDE, kinds={"*": kind}).write(tmp_path / "m.gguf")
    found = loaded(path)
    matrices = [t for t in read_gguf(path).tensors if len(t.shape) == 2]
    assert found.report is not None
    assert len(matrices) == 16
    assert found.storage.reason == (
        f"GGUF blocks as stored: 16 matrices, {sum(t.nbytes for t in matrices) / 1e6:.1f} MB"
    )
    records = {record.name: record for record in found.report.tensors}
    assert list(records) == [t.name for t in read_gguf(path).tensors]
    for tensor in matrices:
        record = records[tensor.name]
        assert (record.form, record.fidelity) == (f"{kind} blocks", "exact")
        assert (record.rmse, record.max_error) == (0, 0)
        assert record.bits_before == record.bits_after
    assert found.model.mapped >= sum(t.nbytes for t in matrices)
    assert found.model.nbytes < path.stat().st_size
    assert nmse(logits(found), logits(loaded(path, policy="exact"))) < 1e-8


def test_weights_are_not_copied(tmp_path: Path) -> None:
    path = Tiny(hidden=512, ffn=2048, layers=4, kinds={"*": "Q8_0"}).write(tmp_path / "m.gguf")
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    found = loaded(path)
    assert found.model.mapped > 10_000_000
    assert logits(found).size
    assert mx.get_active_memory() - before < 500_000


def test_old_experts_of_their_own_are_put_together(tmp_path: Path) -> None:
    """Copied, for a stack has no rows between its matrices; but not converted."""
    rng = np.random.default_rng(0)
    names = [f"blk.{i}.ffn_{part}.{e}.weight" for i in range(2) for part in ("gate", "up", "down")
             for e in range(2)]  # fmt: skip
    router = {f"blk.{i}.ffn_gate_inp.weight": rng.standard_normal((2, 64)) for i in range(2)}
    path = _with_experts(tmp_path / "m.gguf", names, router)
    found, plain = loaded(path), loaded(path, policy="exact")
    assert nmse(logits(found), logits(plain)) < 1e-11
    assert found.report is not None
    notes = [note for note in found.report.notes() if "_exps" in note]
    assert len(notes) == 6
    assert all("copied: its rows are not together in the file" in note for note in notes)


class _Experts(Tiny):
    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = super().shapes()
        for i in range(self.layers):
            shapes[f"blk.{i}.ffn_gate_inp.weight"] = (2, self.hidden)
            for part in ("gate", "up", "down"):
                shape = shapes.pop(f"blk.{i}.ffn_{part}.weight")
                for expert in range(2):
                    shapes[f"blk.{i}.ffn_{part}.{expert}.weight"] = shape
        return shapes


def _with_experts(path: Path, names: list[str], weights: dict[str, np.ndarray]) -> Path:
    kinds = dict.fromkeys(names, "Q8_0")
    keys = {"expert_count": 2, "expert_used_count": 1}
    return _Experts(kinds=kinds, keys=keys, weights=weights).write(path)


def test_matrices_that_cannot_stay_blocks_are_converted_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = replace(WIDE, kinds={"*": "Q4_K"}).write(tmp_path / "m.gguf")
    wanted = logits(loaded(path))
    names = open_gguf(path).names
    turned = [
        replace(m, columns=np.arange(4)) if m.source.name == "blk.1.ffn_up.weight" else m
        for m in names.mapped
    ]
    monkeypatch.setattr(
        "converters.gguf.source.map_tensors", lambda *_: replace(names, mapped=tuple(turned))
    )
    found = loaded(path)
    assert found.report is not None
    assert found.storage.reason.startswith("GGUF blocks as stored: 15 matrices")
    assert found.report.notes() == [
        "blk.1.ffn_up.weight (Q4_K): float32: the order of its columns differs in the model"
    ]
    assert nmse(logits(found), wanted) < 1e-11


def test_only_plain_matrices_stay(tmp_path: Path) -> None:
    matrix = open_gguf(Tiny().write(tmp_path / "m.gguf")).names.mapped[0]
    assert why_not_blocks(matrix) is None
    for change in (
        {"change": lambda x: x}, {"columns": np.arange(2)}, {"shape": (64, 288)},
        {"source": replace(matrix.source, type=GGMLType.F64)},
        {"source": replace(matrix.source, shape=(64,)), "shape": (64,)},
    ):  # fmt: skip
        assert why_not_blocks(replace(matrix, **change))


@pytest.mark.parametrize(
    "options",
    [{"policy": "exact"}, {"policy": "near"}, {"dtype": "float16"}, {"dtype": "bfloat16"}],
)
def test_who_asks_for_another_form_gets_it(tmp_path: Path, options: dict[str, str]) -> None:
    path = replace(WIDE, kinds={"*": "Q4_0"}).write(tmp_path / "m.gguf")
    found = loaded(path, **options)
    assert "blocks" not in found.storage.reason
    assert (found.products, found.storage.missed, found.model.mapped) == (None, None, 0)


def test_without_kernels_a_model_runs_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = replace(WIDE, kinds={"*": "Q4_0"}).write(tmp_path / "m.gguf")
    native = logits(loaded(path))
    monkeypatch.setattr(kernels, "available", lambda *_: kernels.Missing("no compiler"))
    found = loaded(path)
    assert (found.storage.missed, found.products) == ("no compiler", None)
    assert found.storage.reason.startswith("plain float32")
    assert 0 < nmse(logits(found), native) < 1e-11


def test_products_say_how_near_logits_are(tmp_path: Path) -> None:
    path = Tiny(kinds={"*": "Q8_0"}).write(tmp_path / "m.gguf")
    wanted = logits(loaded(path, policy="exact"))
    fast, near, exact = (nmse(logits(loaded(path, products=p)), wanted) for p in products.PLANES)
    assert 1e-6 < fast < 1e-2
    assert 1e-11 < near < 1e-7
    assert exact < 1e-11


def test_products_are_one_of_three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Tiny(kinds={"*": "Q4_0"}).write(tmp_path / "m.gguf")
    with pytest.raises(ParameterError, match="products must be one of fast, near, exact"):
        mlxrun.load(path, products="slow")
    monkeypatch.setenv(products.VARIABLE, "slow")
    with pytest.raises(ParameterError, match="MLXRUN_PRODUCTS must be one of fast, near, exact"):
        mlxrun.load(path)
    monkeypatch.setenv(products.VARIABLE, "fast")
    assert mlxrun.load(path).products == "fast"
    assert mlxrun.load(path, products="exact").products == "exact"
    monkeypatch.delenv(products.VARIABLE)
    assert mlxrun.load(path).products == "near"


def test_a_saved_session_is_of_the_products_that_made_it(tmp_path: Path) -> None:
    path = Tiny(kinds={"*": "Q4_0"}).write(tmp_path / "m.gguf")
    near, exact = (mlxrun.load(path, products=name) for name in ("near", "exact"))
    session = near.session()
    near.generate(TOKENS, session=session, max_tokens=3)
    session.save(tmp_path / "s.safetensors")
    assert near.load_session(tmp_path / "s.safetensors").tokens
    with pytest.warns(match="another model"):
        assert not exact.load_session(tmp_path / "s.safetensors").tokens


def test_two_that_map_one_file_need_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Tiny(hidden=512, ffn=2048, layers=4, kinds={"*": "Q8_0"}).write(tmp_path / "m.gguf")
    one, other = (mlxrun.load(path, products=name) for name in ("exact", "near"))
    (tmp_path / "t.txt").write_text("a text that is long enough " * 10)
    weights: list[list[int]] = []

    def checked(plans: list[Any], *_: int) -> None:
        weights.append([plan.weights for plan in plans])

    monkeypatch.setattr("mlxrun.eval.perplexity.check_memory", checked)
    mlxrun.compare(one, other, (tmp_path / "t.txt").read_text(), context=32, chunks=1)
    words = ["compare", str(path), str(path), str(tmp_path / "t.txt"), "--b-products", "near"]
    assert run([*words, "--context", "32", "--chunks", "1"]) == 0
    whole = one.model.nbytes
    assert weights == [[whole, whole - other.model.mapped]] * 3
    assert whole - other.model.mapped < whole / 10


NAN = np.array([np.nan], np.float16).view(np.uint8)


def test_a_tensor_with_scales_that_are_no_numbers_loads_and_is_named(tmp_path: Path) -> None:
    blocks = gguf.quants.quantize(
        np.random.default_rng(0).standard_normal((96, 64), np.float32),
        gguf.GGMLQuantizationType.Q4_0,
    )
    blocks[7, :2] = NAN
    tiny = Tiny(kinds={"*": "Q4_0"}, raw={"blk.1.ffn_up.weight": ("Q4_0", blocks)})
    llm = mlxrun.load(tiny.write(tmp_path / "m.gguf"))
    for use in (llm.generate, lambda prompt: llm.batch([prompt])):
        with pytest.raises(NumericError, match=r"not finite: blk\.1\.ffn_up\.weight with"):
            use(TOKENS)


CUT = """
import os, sys
from mlxrun.cli.main import run
path, command = sys.argv[1], sys.argv[2:]
load = __import__("mlxrun.llm").llm.load
def loaded(*a, **k):
    llm = load(*a, **k)
    os.truncate(path, os.path.getsize(path) // 2)
    return llm
__import__("mlxrun.llm").llm.load = loaded
sys.exit(run(command))
"""


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "MODEL", "-p", "a", "-n", "8"],
        ["check-batch", "MODEL", "--requests", "2", "--tokens", "4"],
        ["perplexity", "MODEL", "TEXT", "--context", "32"],
    ],
)
def test_a_file_that_is_cut_while_it_is_mapped_is_reported(
    tmp_path: Path, command: list[str]
) -> None:
    path = Tiny(hidden=256, ffn=1024, layers=4, kinds={"*": "Q8_0"}).write(tmp_path / "m.gguf")
    (tmp_path / "t.txt").write_text("a text that is long enough " * 20)
    words = {"MODEL": str(path), "TEXT": str(tmp_path / "t.txt")}
    done = subprocess.run(
        [sys.executable, "-c", CUT, str(path), *(words.get(word, word) for word in command)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONFAULTHANDLER": "1"},
    )
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "m.gguf" in line
    assert "cut short" in line


def test_every_command_that_loads_has_the_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("chat", "generate", "perplexity", "check-batch", "bench"):
        assert run([command, "--help"]) == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert "--products [fast|near|exact]" in printed
        assert "fast 8, near 16, exact 24. [default: near]" in printed
    assert run(["compare", "--help"]) == 0
    assert "--b-products" in capsys.readouterr().out


class Faster:
    """A GPU's kernels that are faster for some types: the CPU's stand in for them."""

    def __init__(self, types: set[GGMLType]) -> None:
        self.types = frozenset(types)
        self._kernels = kernels.available({*types, GGMLType.F32})

    def map(self, tensor: Any) -> mx.array:
        return mx.array(tensor.raw()).reshape(tensor.shape[0], -1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)


def test_a_gpu_keeps_the_types_that_it_multiplies_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = replace(WIDE, kinds={"*": "Q4_K", "blk.0.ffn_down.weight": "Q6_K"}).write(
        tmp_path / "m.gguf"
    )
    expected = logits(loaded(path))
    types = {tensor.type for tensor in read_gguf(path).tensors}
    assert {GGMLType.Q4_K, GGMLType.Q6_K} <= types
    monkeypatch.setattr("mlxrun.loader.cpu_kernels", lambda types, dtype: None)
    monkeypatch.setattr("mlxrun.loader.gpu_kernels", lambda types: Faster({GGMLType.Q6_K}))
    found = loaded(path, dtype="float32")
    assert found.storage.reason.startswith("GGUF blocks as stored: 1 matrices")
    assert found.report is not None
    forms = {record.name: record.form for record in found.report.tensors}
    assert forms["blk.0.ffn_down.weight"] == "Q6_K blocks"
    assert "blocks" not in forms["blk.0.ffn_up.weight"]
    assert found.model.mapped == 0
    assert nmse(logits(found), expected) < 1e-8
