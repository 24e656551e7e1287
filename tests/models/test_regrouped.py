"""Weights stored in other ways - one by one, fused, apart, with a factor - compute the same."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import conformance.skeleton as conformance
import gguf
import mlx.core as mx
import numpy as np
import pytest
from tiny_models import Kind, nmse, random_blocks

from converters.errors import GGUFError
from converters.gguf.reader import read_gguf
from mlxrun import convert
from mlxrun.loader import Loaded, load_model

Tensors = Iterable[tuple[str, np.ndarray, Kind]]
Rewrite = Callable[[str, np.ndarray], Tensors]


def rewritten(source: Path, target: Path, rewrite: Rewrite) -> Path:
    """A copy of a GGUF file in which each tensor becomes what ``rewrite`` makes of it."""
    reader = gguf.GGUFReader(str(source))
    writer = gguf.GGUFWriter(str(target), reader.fields["general.architecture"].contents())
    for name, value in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = value.types[1] if len(value.types) > 1 else None
            writer.add_key_value(name, value.contents(), value.types[0], inner)
    for tensor in reader.tensors:
        plain = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for name, data, kind in rewrite(tensor.name, plain):
            writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def logits(loaded: Loaded) -> np.ndarray:
    assert loaded.unused == []
    model, tokens = loaded.model, mx.arange(40)[None] * 3 % 128
    return np.array(model(tokens, model.make_cache())[0].astype(mx.float32))


def load(path: Path) -> Loaded:
    return load_model(read_gguf(path), dtype="float32", policy="exact")


def written(name: str, path: Path) -> Path:
    return conformance.read(name).write(path)


def one_by_one(name: str, data: np.ndarray) -> Iterator[tuple[str, np.ndarray, Kind]]:
    if "_exps." not in name:
        yield name, data, Kind.F32
        return
    head, _, kind = name.partition("_exps.")
    for number, expert in enumerate(data):
        yield f"{head}.{number}.{kind}", np.ascontiguousarray(expert), Kind.F32


@pytest.mark.parametrize("name", ["mixtral-8x", "mixtral-2x"])
def test_experts_stored_one_by_one(tmp_path: Path, name: str) -> None:
    stacked = written(name, tmp_path / "stacked.gguf")
    apart = rewritten(stacked, tmp_path / "apart.gguf", one_by_one)
    np.testing.assert_array_equal(logits(load(apart)), logits(load(stacked)))


def test_experts_of_different_types_meet_as_floats(tmp_path: Path) -> None:
    stacked = written("mixtral-8x", tmp_path / "stacked.gguf")

    def mixed(name: str, data: np.ndarray) -> Tensors:
        for own, expert, kind in one_by_one(name, data):
            found = re.fullmatch(r"blk\.\d+\.ffn_up\.(\d+)\.weight", own)
            if found and int(found[1]) % 2:
                half = expert.astype(np.float16)
                yield own, half, Kind.F16
            elif found:
                yield own, expert.astype(np.float16).astype(np.float32), kind
            else:
                yield own, expert, kind

    def rounded(name: str, data: np.ndarray) -> Tensors:
        up = "ffn_up_exps" in name
        yield name, data.astype(np.float16).astype(np.float32) if up else data, Kind.F32

    apart = rewritten(stacked, tmp_path / "apart.gguf", mixed)
    expected = rewritten(stacked, tmp_path / "rounded.gguf", rounded)
    np.testing.assert_array_equal(logits(load(apart)), logits(load(expected)))


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    stacked = written("mixtral-8x", tmp_path / "stacked.gguf")

    def without(name: str, data: np.ndarray) -> Tensors:
        return [x for x in one_by_one(name, data) if x[0] != "blk.1.ffn_down.2.weight"]

    with pytest.raises(GGUFError, match=r"blk\.1\.ffn_down\.0\.weight.*experts 0 to \d"):
        load(rewritten(stacked, tmp_path / "apart.gguf", without))


class Fused:
    """Queries, keys and values of each layer in one matrix."""

    def __init__(self) -> None:
        self.held: dict[str, list[np.ndarray]] = {}

    def __call__(self, name: str, data: np.ndarray) -> Tensors:
        found = re.fullmatch(r"(blk\.\d+\.attn_)([qkv])\.(weight|bias)", name)
        if not found:
            return [(name, data, Kind.F32)]
        whole = f"{found[1]}qkv.{found[3]}"
        parts = self.held.setdefault(whole, [])
        parts.append(data)
        return [(whole, np.concatenate(parts), Kind.F32)] if found[2] == "v" else []


def test_a_fused_matrix_is_parted_where_the_model_has_parts(tmp_path: Path) -> None:
    apart = written("phi2-turning", tmp_path / "apart.gguf")
    fused = rewritten(apart, tmp_path / "fused.gguf", Fused())
    np.testing.assert_array_equal(logits(load(fused)), logits(load(apart)))


def test_a_factor_on_a_fused_matrix_is_one_on_each_part(tmp_path: Path) -> None:
    apart = written("phi2-turning", tmp_path / "apart.gguf")

    def doubled(name: str, data: np.ndarray) -> Tensors:
        part = re.fullmatch(r"blk\.\d+\.attn_[qkv]\.weight", name)
        yield name, 2 * data if part else data, Kind.F32

    fuse = Fused()

    def factored(name: str, data: np.ndarray) -> Tensors:
        for made, values, kind in fuse(name, data):
            yield made, values, kind
            if made.endswith("attn_qkv.weight"):
                yield made.replace("weight", "scale"), np.full(1, 2, np.float32), Kind.F32

    fused = load(rewritten(apart, tmp_path / "fused.gguf", factored))
    expected = load(rewritten(apart, tmp_path / "doubled.gguf", doubled))
    np.testing.assert_array_equal(logits(fused), logits(expected))


def test_parts_are_joined_where_the_model_has_them_fused(tmp_path: Path) -> None:
    fused = written("phi3-mha", tmp_path / "fused.gguf")

    def parted(name: str, data: np.ndarray) -> Tensors:
        if "attn_qkv" not in name:
            return [(name, data, Kind.F32)]
        thirds = np.split(data, 3)  # as many keys and values as queries
        return [
            (name.replace("qkv", letter), np.ascontiguousarray(part), Kind.F32)
            for letter, part in zip("qkv", thirds, strict=True)
        ]

    apart = rewritten(fused, tmp_path / "apart.gguf", parted)
    np.testing.assert_array_equal(logits(load(apart)), logits(load(fused)))


class Factored:
    """NVFP4 matrices with a factor; ``plain`` writes the same weights multiplied out."""

    def __init__(self, *, plain: bool) -> None:
        self.plain = plain

    def __call__(self, name: str, data: np.ndarray) -> Tensors:
        matrix = data.ndim > 1 and name.startswith("blk.") and "gate_inp" not in name
        if not matrix or data.shape[-1] % 64:
            return [(name, data, Kind.F32)]
        rng = np.random.default_rng(len(name) + data.size)
        blocks = random_blocks("NVFP4", data.size // 64, 36, rng, scale=1.0)
        factors = rng.uniform(0.005, 0.05, data.shape[0] if data.ndim == 3 else 1)
        factors = factors.astype(np.float32)
        if self.plain:
            values = gguf.quants.dequantize(blocks, Kind.NVFP4).reshape(data.shape)
            return [(name, values * factors.reshape(-1, *[1] * (data.ndim - 1)), Kind.F32)]
        packed = blocks.reshape(*data.shape[:-1], -1)
        return [
            (name, packed, Kind.NVFP4),
            (name.replace("weight", "scale"), factors, Kind.F32),
            (name.replace("weight", "input_scale"), factors, Kind.F32),
        ]


#: NVFP4 comes in blocks of 64.
WIDE_EXPERTS = conformance.Skeleton(
    "wide-experts",
    "llama",
    {
        "block_count": 2,
        "embedding_length": 64,
        "feed_forward_length": 128,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": 16,
        "expert_count": 4,
        "expert_used_count": 2,
    },
    {
        "token_embd.weight": [128, 64],
        "output_norm.weight": [64],
        "output.weight": [128, 64],
        "blk.*.attn_norm.weight": [64],
        "blk.*.attn_q.weight": [64, 64],
        "blk.*.attn_k.weight": [32, 64],
        "blk.*.attn_v.weight": [32, 64],
        "blk.*.attn_output.weight": [64, 64],
        "blk.*.ffn_norm.weight": [64],
        "blk.*.ffn_gate_inp.weight": [4, 64],
        "blk.*.ffn_gate_exps.weight": [4, 128, 64],
        "blk.*.ffn_up_exps.weight": [4, 128, 64],
        "blk.*.ffn_down_exps.weight": [4, 64, 128],
    },
)


@pytest.fixture(params=["qwen3-narrow", "stablelm-biased", "experts"])
def factored(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    experts = request.param == "experts"
    skeleton = WIDE_EXPERTS if experts else conformance.read(request.param)
    source = skeleton.write(tmp_path / "source.gguf")
    return (
        rewritten(source, tmp_path / "factored.gguf", Factored(plain=False)),
        rewritten(source, tmp_path / "plain.gguf", Factored(plain=True)),
    )


@pytest.mark.parametrize("policy", ["exact", "near"])
def test_a_factor_on_a_whole_matrix_stays_separate_from_its_codes(
    factored: tuple[Path, Path], policy: str
) -> None:
    loaded = load_model(read_gguf(factored[0]), dtype="float32", policy=policy)
    assert loaded.report is not None
    kept = [t for t in loaded.report.tensors if t.type == "NVFP4"]
    assert kept
    assert {(t.form, t.fidelity) for t in kept} == {("nvfp4", "exact")}
    assert nmse(logits(loaded), logits(load(factored[1]))) <= 1e-10


def test_a_checkpoint_has_the_factor_in_its_weights(
    factored: tuple[Path, Path], tmp_path: Path
) -> None:
    expected = logits(load(factored[1]))
    for policy, bound in (("exact", 1e-12), ("near", 1e-2)):
        report = convert(factored[0], tmp_path / policy, policy=policy)
        assert all(t.rmse <= (0 if policy == "exact" else 0.01) for t in report.tensors)
        got = logits(load_model(tmp_path / policy, dtype="float32"))
        assert nmse(got, expected) <= bound


def test_a_factor_of_another_shape_or_of_no_matrix_is_refused(tmp_path: Path) -> None:
    source = written("qwen3-narrow", tmp_path / "source.gguf")

    def odd(name: str, data: np.ndarray) -> Tensors:
        yield name, data, Kind.F32
        if name == "blk.0.attn_q.weight":
            yield "blk.0.attn_q.scale", np.ones(3, np.float32), Kind.F32

    def lone(name: str, data: np.ndarray) -> Tensors:
        yield name, data, Kind.F32
        if name == "blk.0.attn_q.weight":
            yield "blk.0.attn_z.scale", np.ones(1, np.float32), Kind.F32

    with pytest.raises(GGUFError, match=r"blk\.0\.attn_q\.scale.*1 factors"):
        load(rewritten(source, tmp_path / "odd.gguf", odd))
    with pytest.raises(GGUFError, match=r"blk\.0\.attn_z\.weight"):
        load(rewritten(source, tmp_path / "lone.gguf", lone))
