"""Whole conversions of directories: what stock mlx-lm makes of them, and what their reports say."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny_models import nmse

import mlxrun
from converters.errors import (
    CheckpointError,
    ConversionError,
    MlxrunError,
    OutOfSpaceError,
    TargetExistsError,
    UnsupportedArchitectureError,
)
from converters.quantize.layout import Layout, affine, fixed
from mlxrun.loader import load_model

TOKENS = mx.array([[1, *range(5, 285, 7)]])
CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip


def weights(dtype: mx.Dtype = mx.bfloat16) -> dict[str, mx.array]:
    from mlx_lm.models import llama

    mx.random.seed(5)
    model = llama.Model(llama.ModelArgs.from_dict(CONFIG))
    return {
        name: (a + 0.1 * mx.random.normal(a.shape)).astype(dtype)
        for name, a in tree_flatten(model.parameters())
    }


def save(path: Path, arrays: dict[str, mx.array], **config: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    mx.save_safetensors(str(path / "model.safetensors"), arrays)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("source") / "m", weights(), torch_dtype="bfloat16")


def ours(path: Path) -> np.ndarray:
    loaded = load_model(path, dtype="float32")
    assert loaded.unused == []
    return np.array(loaded.model(TOKENS, loaded.model.make_cache())[0])


def theirs(path: Path) -> np.ndarray:
    from mlx_lm.utils import load_model as load_stock

    model, _ = load_stock(path)
    model.apply(lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a)
    return np.array(model(TOKENS)[0])


def stored(path: Path) -> dict[str, mx.array]:
    arrays = mx.load(str(path / "model.safetensors"))
    assert isinstance(arrays, dict)
    return arrays


def dequantized(path: Path, module: str, form: Layout) -> np.ndarray:
    """A module's weights as MLX has them, from the file alone."""
    arrays = stored(path)
    parts = [arrays.get(f"{module}.{part}") for part in ("scales", "biases")]
    if form.mode == "affine":
        parts = [part.astype(mx.float32) for part in parts if part is not None]
    options = {"group_size": form.group_size, "bits": form.bits, "mode": form.mode}
    return np.array(mx.dequantize(arrays[f"{module}.weight"], *parts, **options, dtype=mx.float32))


AFFINE = [(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
FORMS: dict[str, tuple[dict[str, Any], Layout]] = {
    **{
        f"{bits} bits by {group}": (
            {"bits": bits, "group_size": group},
            affine(bits, group, "bfloat16"),
        )
        for bits, group in AFFINE
    },
    **{mode: ({"mode": mode}, fixed(mode)) for mode in ("mxfp4", "mxfp8", "nvfp4")},
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_loads_in_both_and_has_the_error_that_the_report_says(
    tmp_path: Path, source: Path, name: str
) -> None:
    options, form = FORMS[name]
    report = mlxrun.convert(source, tmp_path / "out", **options)
    assert nmse(ours(tmp_path / "out"), theirs(tmp_path / "out")) < 1e-9
    module = "model.layers.1.self_attn.k_proj"
    (record,) = [t for t in report.tensors if t.target == f"{module}.weight"]
    assert (record.type, record.fidelity, record.form) == ("bfloat16", "requantized", str(form))
    expected = np.array(weights()[f"{module}.weight"].astype(mx.float32))
    got = dequantized(tmp_path / "out", module, form)
    relative = np.sqrt(((got - expected) ** 2).sum() / (expected**2).sum())
    assert record.rmse == pytest.approx(relative, rel=1e-4)
    assert record.max_error == pytest.approx(np.abs(got - expected).max(), rel=1e-4)
    norms = [t for t in report.tensors if "norm" in t.target]
    assert len(norms) == 5
    assert {(t.form, t.fidelity) for t in norms} == {("bfloat16", "exact")}


def test_no_form_is_worse_than_mlxs_own_rounding(tmp_path: Path, source: Path) -> None:
    for name, (options, form) in FORMS.items():
        report = mlxrun.convert(source, tmp_path / "out", overwrite=True, **options)
        plain = weights()["lm_head.weight"].astype(mx.float32)
        how = {"group_size": form.group_size, "bits": form.bits, "mode": form.mode}
        parts = mx.quantize(plain, **how)
        theirs = mx.dequantize(*parts, **how, dtype=mx.float32)
        error = float(mx.sqrt((theirs - plain).square().sum() / plain.square().sum()))
        (record,) = [t for t in report.tensors if t.target == "lm_head.weight"]
        assert record.rmse is not None
        assert record.rmse <= 1.02 * error, name  # our scales are rounded to bfloat16, these not


def test_mixed_forms_are_written_module_by_module(tmp_path: Path, source: Path) -> None:
    keep = "lm_head=8,embed=6/32,layers.0.mlp=float,*.k_proj=mxfp8"
    mlxrun.convert(source, tmp_path / "out", bits=4, keep=keep)
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert {k: section[k] for k in ("bits", "group_size", "mode")} == {
        "bits": 4, "group_size": 64, "mode": "affine",
    }  # fmt: skip
    assert section["lm_head"]["bits"] == 8
    assert section["model.embed_tokens"] == {"bits": 6, "group_size": 32, "mode": "affine"}
    assert section["model.layers.1.self_attn.k_proj"]["mode"] == "mxfp8"
    assert "model.layers.0.mlp.up_proj.scales" not in stored(tmp_path / "out")
    assert nmse(ours(tmp_path / "out"), theirs(tmp_path / "out")) < 1e-9


def test_widths_that_do_not_divide_stay_floats_with_a_reason(tmp_path: Path, source: Path) -> None:
    report = mlxrun.convert(source, tmp_path / "out", bits=4, group_size=128)
    odd = [t for t in report.tensors if t.target.endswith("down_proj.weight")]
    assert {(t.form, t.fidelity) for t in odd} == {("bfloat16", "exact")}
    assert {t.note for t in odd} == {"192 columns do not divide into groups of 128"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("own", [mx.float16, mx.bfloat16, mx.float32])
def test_plain_copies(tmp_path: Path, own: mx.Dtype, dtype: str) -> None:
    path = save(tmp_path / "m", weights(own))
    report = mlxrun.convert(path, tmp_path / "out", dtype=dtype)
    expected = {name: a.astype(getattr(mx, dtype)) for name, a in weights(own).items()}
    found = stored(tmp_path / "out")
    assert set(found) == set(expected)
    assert all(bool(mx.array_equal(found[name], expected[name])) for name in expected)
    same = all(
        bool(mx.array_equal(expected[name].astype(mx.float32), a.astype(mx.float32)))
        for name, a in weights(own).items()
    )
    assert (set(report.fidelity()) == {"exact"}) == same
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype


@pytest.mark.parametrize(
    ("own", "declared", "expected"),
    [
        (mx.bfloat16, "float32", "bfloat16"),
        (mx.float16, "bfloat16", "float16"),
        (mx.float32, "bfloat16", "bfloat16"),
        (mx.float32, "torch.float16", "float16"),
        (mx.float32, "float32", "float16"),
    ],
)
def test_the_half_precision_is_that_of_the_weights_or_of_the_config(
    tmp_path: Path, own: mx.Dtype, declared: str, expected: str
) -> None:
    report = mlxrun.convert(
        save(tmp_path / "m", weights(own), torch_dtype=declared), tmp_path / "o"
    )
    assert {t.form for t in report.tensors} == {expected}


def test_packed_weights_stay_bit_for_bit_where_the_forms_agree(
    tmp_path: Path, source: Path
) -> None:
    mlxrun.convert(source, tmp_path / "four", bits=4, keep="lm_head=8,embed=mxfp8")
    again = mlxrun.convert(tmp_path / "four", tmp_path / "again", bits=4, keep="lm_head=8")
    before, after = stored(tmp_path / "four"), stored(tmp_path / "again")
    assert again.fidelity() == {"exact": 20, "requantized": 1}
    differing = {
        name for name in after if not mx.array_equal(before.get(name, mx.zeros(1)), after[name])
    }
    assert differing == {f"model.embed_tokens.{part}" for part in ("weight", "scales", "biases")}
    copied = mlxrun.convert(tmp_path / "again", tmp_path / "copy")
    assert copied.fidelity() == {"exact": 21}
    assert np.array_equal(ours(tmp_path / "copy"), ours(tmp_path / "again"))


def test_packed_weights_become_floats_when_asked(tmp_path: Path, source: Path) -> None:
    mlxrun.convert(source, tmp_path / "eight", bits=8)
    report = mlxrun.convert(tmp_path / "eight", tmp_path / "plain", keep="*=float", dtype="float32")
    assert report.fidelity() == {"exact": 21}
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization" not in config
    assert "quantization_config" not in config
    assert nmse(ours(tmp_path / "plain"), ours(tmp_path / "eight")) < 1e-12


def test_another_type_of_scales_is_rounding(tmp_path: Path, source: Path) -> None:
    mlxrun.convert(source, tmp_path / "four", bits=4)
    report = mlxrun.convert(tmp_path / "four", tmp_path / "half", dtype="float16")
    found = stored(tmp_path / "half")
    assert {str(a.dtype) for a in found.values()} == {"mlx.core.uint32", "mlx.core.float16"}
    assert "requantized" not in report.fidelity()
    assert all(t.rmse is not None and t.rmse < 1e-4 for t in report.tensors)


FILES = ["tokenizer.json", "tokenizer.model", "chat_template.jinja", "generation_config.json"]


def test_companions_are_copied_and_code_is_not(tmp_path: Path, source: Path) -> None:
    path = shutil.copytree(source, tmp_path / "m")
    for name in [*FILES, "modeling_custom.py", "pytorch_model.bin", "consolidated.safetensors"]:
        (path / name).write_text("{}")
    config = json.loads((path / "config.json").read_text()) | {"auto_map": {"a": "modeling.B"}}
    (path / "config.json").write_text(json.dumps(config))
    report = mlxrun.convert(path, tmp_path / "out", bits=8)
    written = {file.name for file in (tmp_path / "out").iterdir()}
    made = {"config.json", "conversion.json", "model.safetensors", "model.safetensors.index.json"}
    assert written == {*FILES, *made}
    reasons = {entry["name"]: entry["reason"] for entry in report.skipped}
    assert "code" in reasons["modeling_custom.py"]
    assert set(reasons) == {"modeling_custom.py", "pytorch_model.bin", "consolidated.safetensors"}
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    kept = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert kept["source"]["files"][0]["name"] == "model.safetensors"
    assert len(kept["tensors"]) == 21


def cut(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def twice(path: Path) -> None:
    shutil.copy(path / "model.safetensors", path / "model-2.safetensors")


def without(*names: str) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        arrays = {name: a for name, a in weights().items() if name not in names}
        mx.save_safetensors(str(path / "model.safetensors"), arrays)

    return apply


def with_config(**changes: Any) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        (path / "config.json").write_text(json.dumps(CONFIG | changes))

    return apply


def only(name: str) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        (path / "model.safetensors").rename(path / name)

    return apply


def header(text: bytes) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)

    return apply


UP = "model.layers.1.mlp.up_proj.weight"
GPTQ = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
DAMAGE: dict[str, tuple[Callable[[Path], object], type[MlxrunError], str]] = {
    "cut short": (cut, CheckpointError, "cut short"),
    "the same tensor in two files": (twice, CheckpointError, "both model-2.* hold"),
    "a missing matrix": (without(UP), CheckpointError, "no model.layers.1.mlp.up_proj.weight"),
    "no weights": (only("x.txt"), CheckpointError, "no model"),
    "only PyTorch": (only("pytorch_model.bin"), CheckpointError, "safe_serialization"),
    "only consolidated": (only("consolidated.safetensors"), CheckpointError, "another layout"),
    "a GGUF in a directory": (only("a.gguf"), CheckpointError, "a.gguf itself"),
    "other shapes": (with_config(intermediate_size=256), CheckpointError, "implies"),
    "another family": (with_config(model_type="lama2"), UnsupportedArchitectureError, "lama2"),
    "no family": (with_config(model_type=None), UnsupportedArchitectureError, "None"),
    "a huge model": (with_config(num_hidden_layers=10**9), CheckpointError, "from 1 to"),
    "gptq": (with_config(**GPTQ), CheckpointError, "quantized with gptq.*unquantized original"),
    "header of another kind": (header(b"[]"), CheckpointError, "not a JSON object"),
    "header without entries' parts": (header(b'{"a": {}}'), CheckpointError, "damaged header"),
    "negative shape": (
        header(b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}'),
        CheckpointError,
        "damaged header",
    ),
    "bytes that do not fit the shape": (
        header(b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 0]}}'),
        CheckpointError,
        "need 12",
    ),
    "a type that MLX lacks": (
        header(b'{"a": {"dtype": "F64", "shape": [0], "data_offsets": [0, 0]}}'),
        CheckpointError,
        "stored as F64",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_bad_sources_say_what_is_wrong_and_leave_nothing(
    tmp_path: Path, source: Path, name: str
) -> None:
    damage, kind, match = DAMAGE[name]
    path = shutil.copytree(source, tmp_path / "m")
    damage(path)
    with pytest.raises(kind, match=match) as caught:
        mlxrun.convert(path, tmp_path / "out", bits=4)
    assert "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    arrays = weights()
    arrays[UP] = mx.where(mx.arange(128) == 3, value, arrays[UP])
    path = save(tmp_path / "m", arrays)
    for options in ({"bits": 4}, {"mode": "mxfp4"}, {}, {"dtype": "float32"}):
        with pytest.raises(ConversionError, match=r"up_proj.*not-a-number weights.*=float"):
            mlxrun.convert(path, tmp_path / "out", **options)  # type: ignore[arg-type]
    keep = f"{UP.removesuffix('.weight')}=float"
    for options in ({"bits": 4}, {}):
        report = mlxrun.convert(path, tmp_path / "out", keep=keep, overwrite=True, **options)
        assert next(t for t in report.tensors if t.target == UP).fidelity == "exact"


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
def test_a_norm_that_is_not_finite(tmp_path: Path, dtype: mx.Dtype) -> None:
    arrays = weights(dtype)
    arrays["model.norm.weight"] = mx.full((128,), float("nan"), dtype)
    path = save(tmp_path / "m", arrays)
    with pytest.raises(ConversionError, match=r"model\.norm\.weight holds .*not-a-number"):
        mlxrun.convert(path, tmp_path / "out")


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("kind", ["scales", "biases", "weight"])
def test_packed_weights_of_bytes_that_are_ones(
    tmp_path: Path, source: Path, mode: str, kind: str
) -> None:
    options: dict[str, Any] = {"bits": 4} if mode == "affine" else {"mode": mode}
    packed = Path(str(mlxrun.convert(source, tmp_path / "packed", **options).path))
    arrays = stored(packed)
    damaged = {name: a for name, a in arrays.items() if name == UP.replace("weight", kind)}
    for name, array in damaged.items():
        ones = mx.full((array.nbytes,), 0xFF, mx.uint8)
        arrays[name] = ones.view(array.dtype).reshape(array.shape)
    mx.save_safetensors(str(packed / "model.safetensors"), arrays)
    # Codes are numbers whatever their bits, but in mxfp8, where each is a float.
    if damaged and (kind != "weight" or mode == "mxfp8"):
        with pytest.raises(ConversionError, match=r"up_proj\.weight holds .*not-a-number"):
            mlxrun.convert(packed, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    else:
        assert mlxrun.convert(packed, tmp_path / "out").fidelity().keys() == {"exact"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "has no tokenizer"),
        ("{}", "tokenizer.json is damaged: it has no 'model'"),
        ("{", "is not valid JSON"),
        ('{"model": []}', "is damaged"),
    ],
)
def test_an_unusable_tokenizer_is_reported(
    tmp_path: Path, source: Path, content: str | None, said: str
) -> None:
    path = shutil.copytree(source, tmp_path / "m")
    if content is not None:
        (path / "tokenizer.json").write_text(content)
    report = mlxrun.convert(path, tmp_path / "out")
    assert len(report.warnings) == 1 and said in report.warnings[0]


def test_files_that_are_cut_while_they_are_read(tmp_path: Path, source: Path) -> None:
    path = shutil.copytree(source, tmp_path / "m")
    weights = path / "model.safetensors"
    whole = weights.read_bytes()

    def cut(*_: object) -> None:
        os.truncate(weights, len(whole) // 2)

    with pytest.raises(CheckpointError, match=r"model\.safetensors: .* cut short"):
        mlxrun.convert(path, tmp_path / "out", progress=cut)
    assert not (tmp_path / "out").exists()


def test_weights_too_large_for_half_precision(tmp_path: Path) -> None:
    arrays = weights(mx.float32)
    arrays[UP] = arrays[UP] * 1e7
    path = save(tmp_path / "m", arrays)
    for options in ({}, {"bits": 8}):
        with pytest.raises(ConversionError, match=r"up_proj.*--dtype bfloat16"):
            mlxrun.convert(path, tmp_path / "out", **options)  # type: ignore[arg-type]
    mlxrun.convert(path, tmp_path / "out", bits=8, dtype="bfloat16")
    assert np.isfinite(ours(tmp_path / "out")).all()


def test_a_target_is_never_replaced_unasked(tmp_path: Path, source: Path) -> None:
    mlxrun.convert(source, tmp_path / "out", bits=4)
    with pytest.raises(TargetExistsError):
        mlxrun.convert(source, tmp_path / "out", bits=8)
    assert mlxrun.convert(source, tmp_path / "out", bits=8, overwrite=True).bits_after > 8


def test_a_full_disk_is_noticed_before_anything_is_written(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutOfSpaceError, match=r"has 0\.0 MB free, out needs at least 0\.\d MB"):
        mlxrun.convert(source, tmp_path / "out", bits=4)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path, source: Path) -> None:
    def interrupt(done: int, total: int, name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mlxrun.convert(source, tmp_path / "out", bits=4, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_up_to_the_bytes_of_the_source(tmp_path: Path, source: Path) -> None:
    seen: list[tuple[int, int]] = []
    mlxrun.convert(source, tmp_path / "out", bits=4, progress=lambda a, b, _: seen.append((a, b)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] == sum(a.nbytes for a in weights().values())


def test_a_source_is_not_its_own_target(source: Path) -> None:
    with pytest.raises(TargetExistsError, match=r"holds .* to be converted"):
        mlxrun.convert(source, source, bits=4, overwrite=True)
    assert np.isfinite(ours(source)).all()


def test_hashes_are_those_of_the_files(tmp_path: Path, source: Path) -> None:
    report = mlxrun.convert(source, tmp_path / "out", bits=4)
    data = (source / "model.safetensors").read_bytes()
    assert report.source["files"] == [
        {
            "name": "model.safetensors",
            "size": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
    ]
