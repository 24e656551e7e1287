"""Whole conversions: what stock mlx-lm makes of them, what they say, and how they fail."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import naive_decoder
import numpy as np
import pytest
from mlx.utils import tree_map
from oracle_models import SKELETONS, expected, write_skeleton
from patience import PATIENCE
from tiny_models import Tiny, nmse, split

from converters.convert import target_path
from converters.errors import (
    GGUFError,
    OutOfSpaceError,
    TargetExistsError,
    UnsupportedArchitectureError,
)
from converters.quantize.policy import POLICIES
from mlxrun import convert
from mlxrun.loader import load_model

TOKENS = [1, *range(5, 285, 7), *range(6, 280, 11)]
BIASED = ("attn_q", "attn_k", "attn_v")


def mlx_lm_logits(path: Path, tokens: list[int], dtype: mx.Dtype | None = None) -> np.ndarray:
    """What stock mlx-lm computes from a directory, strictly loaded; (T, V)."""
    from mlx_lm.utils import load_model as load_stock

    model, _ = load_stock(path, lazy=False, strict=True)
    if dtype is not None:
        model.update(
            tree_map(
                lambda a: a.astype(dtype) if mx.issubdtype(a.dtype, mx.floating) else a,
                model.parameters(),
            )
        )
    return np.array(model(mx.array([tokens]))[0].astype(mx.float32))


@dataclass(frozen=True)
class Limit:
    """Where stock mlx-lm computes something else than llama.cpp, and how near it comes."""

    reason: str
    error: float = 1e-9
    near: float = 1e-4
    tokens: int | None = None


_TABLE = "ggml looks GELU up in a table of half-precision numbers, mlx-lm computes it"
LIMITS: dict[str, Limit] = {
    "gemma": Limit(_TABLE, error=1e-6),
    "gemma2": Limit(_TABLE + "; it ignores the window, too", error=1e-6, tokens=32),
    "gemma3": Limit(_TABLE, error=1e-6),
    "phi2": Limit(_TABLE, error=1e-6),
    "phi3-longrope": Limit(
        "it computes the attention factor from the context lengths, whatever the file says (1.19)",
        error=0.2,
        near=0.2,
    ),
    "qwen3moe": Limit("in half precision a token may go to another expert", near=1e-3),
    "starcoder2": Limit(_TABLE, error=1e-6),
}


@pytest.mark.parametrize("name", SKELETONS)
def test_mlx_lm_computes_llama_cpps_logits_from_exact_conversions(
    oracle: Path, tmp_path: Path, name: str
) -> None:
    source = write_skeleton(oracle, name, tmp_path / "x.gguf")
    limit = LIMITS.get(name, Limit("none"))
    tokens, wanted = expected(oracle, f"logits/{name}")
    tokens, wanted = tokens[: limit.tokens], wanted[: limit.tokens]
    convert(source, tmp_path / "exact", policy="exact")
    assert nmse(mlx_lm_logits(tmp_path / "exact", tokens, mx.float32), wanted) < limit.error
    report = convert(source, tmp_path / "near")
    assert nmse(mlx_lm_logits(tmp_path / "near", tokens, mx.float32), wanted) < limit.near
    assert max(record.rmse for record in report.tensors) < 1e-3  # floats in half precision


def test_mlx_lm_agrees_on_long_rope_whose_factor_is_the_usual_one(
    oracle: Path, tmp_path: Path
) -> None:
    """What its own attention factor hides above: the frequencies are right."""
    source = write_skeleton(oracle, "phi3-longrope", tmp_path / "x.gguf")
    convert(source, tmp_path / "out", policy="exact")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_scaling"].pop("attention_factor") == pytest.approx(1.19)
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    ours = load_model(tmp_path / "out", dtype="float32").model
    got = np.array(ours(mx.array([TOKENS]), ours.make_cache())[0])
    assert nmse(mlx_lm_logits(tmp_path / "out", TOKENS, mx.float32), got) < 1e-9


BLOCKS = {"*": "Q4_0", "output.weight": "Q8_0", "blk.0.attn_v.weight": "Q5_1"}
K_QUANTS = {
    "*": "Q4_K",
    "output.weight": "Q6_K",
    "blk.0.attn_q.weight": "Q3_K",
    "blk.0.attn_k.weight": "Q5_K",
    "blk.0.ffn_up.weight": "IQ4_XS",
    "blk.1.ffn_up.weight": "Q2_K",
}
WIDE: dict[str, Any] = {"hidden": 256, "ffn": 512, "heads": 8, "kv_heads": 2}
MODELS = {
    "multi-head": Tiny(kv_heads=4),
    "one key-value head": Tiny(heads=8, kv_heads=1),
    "odd heads": Tiny(heads=9, kv_heads=3, head_dim=16, hidden=96, biases=BIASED),
    "wide heads": Tiny(heads=3, kv_heads=1, head_dim=128, hidden=32),
    "blocks and biases": Tiny(kinds=BLOCKS, biases=("attn_q", "attn_k")),
    "tied blocks": Tiny(kinds=BLOCKS | {"token_embd.weight": "Q8_0"}, tied=True),
    "a bias in the last layer": Tiny(biases=("attn_k", "ffn_down"), bias_layers=(1,)),
    "all biases": Tiny(biases=(*BIASED, "attn_output", "ffn_gate", "ffn_up", "ffn_down")),
    "k-quants": Tiny(**WIDE, kinds=K_QUANTS),
    "microscaling": Tiny(**WIDE, kinds={"*": "MXFP4", "blk.0.attn_q.weight": "NVFP4"}),
    "ternary": Tiny(**WIDE, kinds={"*": "TQ1_0", "blk.0.attn_q.weight": "TQ2_0"}),
    "bf16": Tiny(kinds={"*": "BF16"}),
    "f16 and bf16": Tiny(kinds={"*": "F16", "blk.0.attn_q.weight": "BF16"}),
    "linear": Tiny(keys={"rope.scaling.type": "linear", "rope.scaling.factor": 3.0}),
    "frequency factors": Tiny(rope_freqs=np.linspace(1, 4, 8)),
    "factors and linear": Tiny(rope_freqs=np.linspace(1, 4, 8), keys={"rope.scaling.factor": 3.0}),
    "yarn": Tiny(
        keys={
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 64,
            "rope.scaling.attn_factor": 1.2,
        }
    ),
    "qwen2": Tiny(arch="qwen2", biases=BIASED, heads=7, kv_heads=1, hidden=112),
    "qwen2 without biases": Tiny(arch="qwen2", tied=True),
    "qwen3": Tiny(arch="qwen3", head_dim=32, kinds=BLOCKS, tied=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_mlx_lm_agrees_with_a_naive_decoder_on_exact_conversions(tmp_path: Path, name: str) -> None:
    model = MODELS[name]
    convert(model.write(tmp_path / "x.gguf"), tmp_path / "out", policy="exact")
    got = mlx_lm_logits(tmp_path / "out", TOKENS, mx.float32)
    assert nmse(got, naive_decoder.logits(model, TOKENS)) < 1e-9


@pytest.mark.parametrize("policy", ["near", "compact"])
@pytest.mark.parametrize("name", MODELS)
def test_what_mlx_lm_loads_is_what_mlxrun_loads(tmp_path: Path, name: str, policy: str) -> None:
    convert(MODELS[name].write(tmp_path / "x.gguf"), tmp_path / "out", policy=policy)
    model = load_model(tmp_path / "out", dtype="float32").model
    ours = np.array(model(mx.array([TOKENS]), model.make_cache())[0])
    theirs = mlx_lm_logits(tmp_path / "out", TOKENS, mx.float32)
    assert nmse(ours, theirs) < 1e-9


def test_mlx_lm_loads_tokenizer_and_all(tmp_path: Path) -> None:
    import mlx_lm

    convert(Tiny(kinds=BLOCKS).write(tmp_path / "x.gguf"), tmp_path / "out")
    model, tokenizer = mlx_lm.load(str(tmp_path / "out"))
    ids = tokenizer.encode("at")
    assert ids[0] == 1
    assert np.isfinite(np.array(model(mx.array([ids])).astype(mx.float32))).all()


def test_conversion_json_says_what_was_done(tmp_path: Path) -> None:
    source = Tiny(**WIDE, kinds=K_QUANTS, rope_freqs=np.linspace(1, 4, 16)).write(
        tmp_path / "x.gguf"
    )
    report = convert(source, tmp_path / "out")
    stated = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert stated == report.to_dict()
    assert stated["policy"] == "near"
    assert stated["source"]["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert stated["source"]["files"][0]["size"] == source.stat().st_size
    written = {
        name for file in (tmp_path / "out").glob("*.safetensors") for name in mx.load(str(file))
    }
    records = {record["name"]: record for record in stated["tensors"]}
    skipped = {record["name"]: record for record in stated["skipped"]}
    reader = gguf.GGUFReader(source)
    assert set(records) | set(skipped) == {tensor.name for tensor in reader.tensors}
    assert not set(records) & set(skipped)
    assert set(skipped) == {"rope_freqs.weight"}
    assert "config.json" in skipped["rope_freqs.weight"]["reason"]
    for record in records.values():
        assert record["target"] in written
        assert record["fidelity"] in ("exact", "rounded", "requantized")
        assert record["rmse"] <= 0.01
        assert (record["fidelity"] == "exact") == (record["rmse"] == 0)
    for tensor in reader.tensors:
        if tensor.name in records:
            assert records[tensor.name]["type"] == tensor.tensor_type.name
    fidelity = {name: record["fidelity"] for name, record in records.items()}
    assert fidelity["blk.0.attn_q.weight"] == "exact"  # Q3_K
    assert fidelity["blk.0.attn_k.weight"] == "rounded"  # Q5_K: scales in half precision
    assert fidelity["output.weight"] == "requantized"  # Q6_K
    size = sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    assert 0 < size - report.nbytes < 1 << 21  # the header's room


def test_tensors_without_a_place_are_named(tmp_path: Path) -> None:
    extra = Tiny()
    shapes = extra.shapes
    odd = {"blk.0.attn_sinks.weight": (4,), "some.thing": (3, 8), "blk.0.attn_norm.bias": (64,)}
    extra.shapes = lambda: shapes() | odd  # type: ignore[method-assign]
    report = convert(extra.write(tmp_path / "x.gguf"), tmp_path / "out")
    assert {record["name"] for record in report.skipped} == set(odd)
    assert all(record["reason"] for record in report.skipped)


def test_split_files_convert_like_whole_ones(tmp_path: Path) -> None:
    model = Tiny(kinds=BLOCKS)
    convert(model.write(tmp_path / "whole.gguf"), tmp_path / "a", policy="exact")
    split(tmp_path / "whole.gguf", tmp_path / "part", shards=3)
    report = convert(tmp_path / "part-00001-of-00003.gguf", tmp_path / "b", policy="exact")
    a, b = ({**mx.load(str(tmp_path / d / "model.safetensors"))} for d in "ab")
    assert set(a) == set(b)
    for name, array in a.items():
        assert mx.array_equal(array, b[name])
    parts = sorted(tmp_path.glob("part-*.gguf"))
    hashes = [hashlib.sha256(part.read_bytes()).hexdigest() for part in parts]
    assert [file["sha256"] for file in report.source["files"]] == hashes
    assert (tmp_path / "a" / "config.json").read_text() == (
        tmp_path / "b" / "config.json"
    ).read_text()


def fails(source: Path, target: Path, kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match):
        convert(source, target)
    assert not target.exists()
    assert not list(target.parent.glob(".*"))


def test_unknown_architectures_name_the_nearest(tmp_path: Path) -> None:
    source = Tiny(arch="qwen33").write(tmp_path / "x.gguf")
    fails(source, tmp_path / "out", UnsupportedArchitectureError, "'qwen33'.*nearest.*qwen3")
    source = Tiny(arch="zzz").write(tmp_path / "x.gguf")
    fails(
        source, tmp_path / "out", UnsupportedArchitectureError, "Supported: .*llama.* qwen2.* qwen3"
    )


CONTRADICTIONS: dict[str, tuple[Tiny, str]] = {
    "experts": (
        Tiny(arch="qwen2", keys={"expert_count": 4, "expert_used_count": 2}),
        "expert_count.*no experts",
    ),
    "no expert tensors": (
        Tiny(keys={"expert_count": 4, "expert_used_count": 2}),
        r"blk\.0\.ffn_gate_inp\.weight",
    ),
    "more experts used than there are": (
        Tiny(keys={"expert_count": 4, "expert_used_count": 5}),
        "blk|expert_used_count",
    ),
    "heads differ": (Tiny(keys={"attention.head_count": [4, 2]}), "one value for all layers"),
    "value width": (
        Tiny(head_dim=16, keys={"attention.value_length": 8}),
        "value_length.*key_length",
    ),
    "missing weight": (Tiny(drop=("blk.1.ffn_down.weight",)), r"blk\.1\.ffn_down\.weight"),
    "missing norm": (Tiny(drop=("output_norm.weight",)), r"output_norm\.weight"),
    "missing key": (Tiny(keys={"attention.layer_norm_rms_epsilon": None}), "rms_epsilon"),
    "more heads than rows": (
        Tiny(heads=4, keys={"attention.head_count": 8, "rope.dimension_count": 8}),
        r"attn_k\.weight.*16 x 64.*32 x 64",
    ),
    "feed-forward": (Tiny(keys={"feed_forward_length": 100}), r"ffn_gate\.weight.*100 x 64"),
    "rope type": (Tiny(keys={"rope.scaling.type": "spiral"}), "none, linear, yarn.*spiral"),
    "attention factor": (Tiny(keys={"rope.scaling.attn_factor": 1.5}), "attn_factor"),
    "factors and yarn": (
        Tiny(
            rope_freqs=np.ones(8),
            keys={"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0},
        ),
        "rope_freqs",
    ),
    "too few factors": (Tiny(rope_freqs=np.ones(8), keys={"rope.dimension_count": 12}), "12"),
    "factor of zero": (Tiny(rope_freqs=np.zeros(8)), "rope_freqs.*positive"),
    "norm": (Tiny(raw={}, weights={}), "output_norm"),
    "output bias": (Tiny(), r"output\.bias"),
    "matrix factor": (Tiny(), r"attn_q\.scale.*factor"),
}


def with_shape(model: Tiny, name: str, shape: tuple[int, ...]) -> Tiny:
    shapes = model.shapes()
    model.shapes = lambda: shapes | {name: shape}  # type: ignore[method-assign]
    return model


with_shape(CONTRADICTIONS["norm"][0], "output_norm.weight", (32,))
with_shape(CONTRADICTIONS["output bias"][0], "output.bias", (288,))
with_shape(CONTRADICTIONS["matrix factor"][0], "blk.0.attn_q.scale", (2,))


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_metadata_that_lies_is_refused_before_anything_is_written(
    tmp_path: Path, name: str
) -> None:
    model, match = CONTRADICTIONS[name]
    fails(model.write(tmp_path / "x.gguf"), tmp_path / "out", GGUFError, match)


def test_infinite_scales_leave_nothing_behind(tmp_path: Path) -> None:
    blocks = np.zeros((96 * 2, 18), np.uint8)
    blocks[100, :2] = np.float16(np.nan).reshape(1).view(np.uint8)
    model = Tiny(raw={"blk.1.ffn_up.weight": ("Q4_0", blocks)})
    source = model.write(tmp_path / "x.gguf")
    fails(source, tmp_path / "out", GGUFError, r"blk\.1\.ffn_up\.weight.*finite")


def test_an_existing_target_is_an_error_before_any_work(tmp_path: Path) -> None:
    source = Tiny().write(tmp_path / "x.gguf")
    (tmp_path / "out").mkdir()
    calls: list[Any] = []
    with pytest.raises(TargetExistsError):
        convert(source, tmp_path / "out", progress=lambda *step: calls.append(step))
    assert not calls


def test_a_disk_too_small_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Tiny().write(tmp_path / "x.gguf")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    fails(source, tmp_path / "out", OutOfSpaceError, "free")


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0", "BF16", "F32"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_disk_is_too_small_below_about_what_the_weights_take(
    kind: str, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Tiny(kinds={"*": kind}).write(tmp_path / "x.gguf")
    report = convert(source, tmp_path / "made", policy=policy)
    taken = sum(tensor.bits_after * tensor.elements / 8 for tensor in report.tensors)

    def free(share: float) -> None:
        usage = shutil.disk_usage(tmp_path)._replace(free=int(taken * share))
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    free(1.0)
    convert(source, tmp_path / "out", policy=policy)
    free(0.7)
    with pytest.raises(OutOfSpaceError, match="free"):
        convert(source, tmp_path / "more", policy=policy)
    assert not (tmp_path / "more").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of half a megabyte, where this process may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(place)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up(small_disk: Path, tmp_path: Path) -> None:
    """The header's room alone is larger than this disk."""
    source = Tiny().write(tmp_path / "x.gguf")
    fails(source, small_disk / "out", OutOfSpaceError, "full|free")
    assert not list(small_disk.iterdir())


def test_progress_is_counted_in_bytes_of_the_file(tmp_path: Path) -> None:
    source = Tiny().write(tmp_path / "x.gguf")
    steps: list[tuple[int, int, str]] = []
    convert(source, tmp_path / "out", progress=lambda *step: steps.append(step))
    total = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(source).tensors)
    assert [done for done, _, _ in steps] == sorted(done for done, _, _ in steps)
    assert {whole for _, whole, _ in steps} == {total}
    assert steps[-1][0] == total


def test_the_default_target_is_named_after_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = Tiny().write(tmp_path / "some.model.gguf")
    assert convert(source).path == str(target_path(None, source))
    assert (tmp_path / "some.model-mlx" / "config.json").is_file()


SLOW = """
import sys, time
from mlxrun import convert
convert(sys.argv[1], sys.argv[2], progress=lambda *a: (print("step", flush=True), time.sleep(0.2)))
"""


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_killed_conversion_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    source = Tiny().write(tmp_path / "x.gguf")
    target = tmp_path / "place" / "out"
    command = [sys.executable, "-c", SLOW, str(source), str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "step\n"
        os.kill(process.pid, signal.SIGKILL)
    assert not target.exists()
    leftover = list(target.parent.iterdir())
    assert len(leftover) == 1
    assert leftover[0].name.startswith(".mlxrun-partial-")
    convert(source, target)
    assert list(target.parent.iterdir()) == [target]


# VmHWM and not ru_maxrss, which a process inherits from the one that started it.
MEASURE = """
import sys
from converters.quantize import encode
from mlxrun import convert

encode.CHUNK_WEIGHTS = 1 << 18  # as small beside the file as whole chunks are beside a model

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

convert(sys.argv[1], sys.argv[3])
before = peak()
convert(sys.argv[2], sys.argv[4])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_memory_is_bounded_by_the_largest_tensors(tmp_path: Path) -> None:
    """A file of 70 MB in matrices of a megabyte: what is resident must not grow with the file."""
    shape: dict[str, Any] = {
        "hidden": 512,
        "ffn": 2048,
        "heads": 8,
        "kv_heads": 8,
        "kinds": {"*": "Q6_K"},
    }
    Tiny(**shape, layers=2).write(tmp_path / "warm.gguf")
    large = Tiny(**shape, layers=20).write(tmp_path / "large.gguf")
    size = large.stat().st_size
    assert size > 60e6
    files = [str(tmp_path / name) for name in ("warm.gguf", "large.gguf", "a", "b")]
    command = [sys.executable, "-c", MEASURE, *files]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(done.stdout) * 1024 < size / 4
