"""The promises of each policy, checked against the weights that it writes, type by type."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
from tiny_models import Kind, Tiny, random_blocks

from converters.convert import Converted, stream
from converters.errors import ConversionError, GGUFError, InexactError
from converters.gguf.file import GGUFTensor
from converters.gguf.quants import CODECS
from converters.gguf.reader import GGUFFile, read_gguf
from converters.gguf.source import GGUFSource, gguf_tensors, half_dtype, open_gguf
from converters.gguf.types import BLOCKS, GGMLType
from converters.quantize.affine import Arrays
from converters.quantize.encode import Encoded, encode
from converters.quantize.layout import Layout
from converters.quantize.policy import POLICIES, Policy
from mlxrun.errors import ParameterError

HALVES = ("float16", "bfloat16")


def values(layout: Layout, arrays: Arrays) -> np.ndarray:
    """The weights that MLX sees, float32."""
    if not layout.quantized:
        weight = mx.array(arrays["weight"])
        weight = weight.view(mx.bfloat16) if layout.dtype == "bfloat16" else weight
        return np.array(weight.astype(mx.float32))
    parts = []
    for name in ("scales", "biases"):
        part = mx.array(arrays[name]) if name in arrays else None
        if part is not None and layout.mode == "affine":
            part = part.view(mx.bfloat16) if layout.dtype == "bfloat16" else part
            part = part.astype(mx.float32)
        parts.append(part)
    return np.array(
        mx.dequantize(
            mx.array(arrays["weight"]),
            *parts,
            group_size=layout.group_size,
            bits=layout.bits,
            mode=layout.mode,
            dtype=mx.float32,
        )
    )


def truth(tensor: GGUFTensor) -> np.ndarray:
    """The weights as the ``gguf`` package reads them (or by definition where it cannot)."""
    raw = tensor.raw().reshape(-1, BLOCKS[tensor.type][1])
    if tensor.type in (GGMLType.Q1_0, GGMLType.Q2_0):
        return CODECS[tensor.type].decode(raw).values().reshape(tensor.shape)
    if tensor.type is GGMLType.F32:
        return tensor.raw().view(np.float32).reshape(tensor.shape)
    return gguf.quants.dequantize(raw, Kind[tensor.type.name]).reshape(tensor.shape)


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    got, expected = got.astype(np.float64), expected.astype(np.float64)
    return float(np.sqrt(((got - expected) ** 2).sum() / (expected**2).sum()))


def assert_promise(policy: str, tensor: GGUFTensor, converted: Converted) -> None:
    layout, arrays, record = converted.layout, converted.arrays, converted.record
    assert record is not None
    got, expected = values(layout, arrays), truth(tensor)
    assert got.shape == expected.shape
    error, largest = relative(got, expected), float(np.abs(got - expected).max())
    assert record.rmse == pytest.approx(error, rel=1e-3, abs=1e-7)
    assert record.max_error == pytest.approx(
        largest, rel=1e-3, abs=1e-7 * float(np.abs(expected).max())
    )
    stored = sum(array.nbytes for array in arrays.values()) * 8 / tensor.elements
    assert record.bits_after == pytest.approx(stored)
    assert record.bits_before == pytest.approx(tensor.nbytes * 8 / tensor.elements)
    if policy == "exact" or record.fidelity == "exact":
        assert record.fidelity == "exact"
        np.testing.assert_array_equal(got, expected)
    else:
        assert largest > 0
    if policy == "near":
        assert error <= 0.01
    if policy == "compact":
        assert record.bits_after <= record.bits_before + 0.5 or record.note


@pytest.mark.parametrize("policy", POLICIES)
def test_files_of_llama_quantize(oracle: Path, policy: str) -> None:
    """Every tensor of every file type, written and read back as MLX would read it."""
    for path in sorted((oracle / "quants").glob("*.gguf")):
        if "gpt-oss" in path.name:
            continue
        file = read_gguf(path)
        bound = Policy(policy, half_dtype(file))
        names = open_gguf(file).names
        unpermuted = tuple(m for m in names.mapped if m.order is None)
        for converted in stream(gguf_tensors(names, bound)):
            if converted.target.split(".")[-2] in ("q_proj", "k_proj"):
                continue  # rows in another order; test_convert has them
            tensor = next(m.source for m in unpermuted if m.target == converted.target)
            assert_promise(policy, tensor, converted)


def one(tmp_path: Path, kind: str, blocks: np.ndarray, rows: int = 4) -> GGUFFile:
    """A file with one matrix of given blocks."""
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    dtype = Kind[kind] if kind in Kind.__members__ else None
    assert dtype is not None
    writer.add_tensor("w.weight", blocks.reshape(rows, -1), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_gguf(tmp_path / "one.gguf")


def encoded(file: GGUFFile, policy: Policy) -> Encoded:
    with ThreadPoolExecutor(2) as pool:
        return encode(file.tensors[0], policy, module=True, pool=pool)


BLOCKED = [kind.name for kind in sorted(CODECS) if kind.name in Kind.__members__]


@pytest.mark.parametrize("kind", BLOCKED)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("scale", [1e-7, 1e-3, None])
def test_scales_of_any_size(tmp_path: Path, kind: str, policy: str, scale: float | None) -> None:
    """From subnormal half-precision scales to those that overflow once multiplied out.

    A form is found whose error is what it says, or an error is raised: never silent damage.
    """
    count = 4 * max(1, 512 // BLOCKS[GGMLType[kind]][0])
    blocks = random_blocks(kind, count, BLOCKS[GGMLType[kind]][1], np.random.default_rng(1), scale)
    file = one(tmp_path, kind, blocks)
    expected = truth(file.tensors[0])
    for half in HALVES:
        try:
            result = encoded(file, Policy(policy, half))
        except GGUFError as error:
            assert policy == "compact"  # which may not fall back to floats
            assert "w.weight" in str(error)
            continue
        got = values(result.layout, result.arrays)
        assert np.isfinite(got).all()
        assert result.error.rmse == pytest.approx(relative(got, expected), rel=1e-3, abs=1e-6)
        if policy == "exact":
            np.testing.assert_array_equal(got, expected)
        if policy == "near":
            assert relative(got, expected) <= 0.01


@pytest.mark.parametrize("kind", BLOCKED)
@pytest.mark.parametrize("policy", POLICIES)
def test_blocks_of_zeros(tmp_path: Path, kind: str, policy: str) -> None:
    size = BLOCKS[GGMLType[kind]][1]
    blocks = random_blocks(kind, 16, size, np.random.default_rng(2), 0.01)
    blocks[:8] = random_blocks(kind, 8, size, np.random.default_rng(3), 0.0)
    file = one(tmp_path, kind, blocks)
    expected = truth(file.tensors[0])
    assert not expected[:2].any()
    got = encoded(file, Policy(policy))
    np.testing.assert_array_equal(values(got.layout, got.arrays)[:2], expected[:2])


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q6_K", "IQ4_XS", "TQ2_0"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("half", ["float16", "float32"])
def test_infinite_scales_are_an_error(
    tmp_path: Path, kind: str, special: float, policy: str, half: str
) -> None:
    blocks = random_blocks(kind, 16, BLOCKS[GGMLType[kind]][1], np.random.default_rng(4), 0.01)
    damaged = random_blocks(kind, 1, blocks.shape[1], np.random.default_rng(5), special)
    blocks[7] = damaged
    with pytest.raises(GGUFError, match=r"w\.weight.*finite"):
        encoded(one(tmp_path, kind, blocks), Policy(policy, half))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("half", HALVES)
def test_special_floats_are_copied(tmp_path: Path, policy: str, half: str) -> None:
    """Plain floats may be anything; whatever changes is stated."""
    w = np.random.default_rng(6).standard_normal((4, 64)).astype(np.float32)
    w[1, 3:8] = [np.nan, np.inf, -np.inf, 1e38, 1e-42]
    result = encoded(one(tmp_path, "F32", w), Policy(policy, half))
    np.testing.assert_array_equal(values(result.layout, result.arrays), w)
    assert result.error.equal


def test_floats_too_small_for_half_precision_stay_wide(tmp_path: Path) -> None:
    w = (np.random.default_rng(7).standard_normal((4, 64)) * 1e-30).astype(np.float32)
    result = encoded(one(tmp_path, "F32", w), Policy("near", "float16"))
    np.testing.assert_array_equal(values(result.layout, result.arrays), w)


def test_narrow_matrices_get_narrow_groups(tmp_path: Path) -> None:
    """Rows of 96 weights hold groups of 32 only."""
    blocks = random_blocks("IQ4_NL", 12, 18, np.random.default_rng(8), 0.01)
    file = one(tmp_path, "IQ4_NL", blocks)
    assert file.tensors[0].shape == (4, 96)
    for policy in POLICIES:
        layout = encoded(file, Policy(policy)).layout
        assert not layout.quantized or layout.group_size == 32
    file = one(tmp_path, "IQ4_NL", random_blocks("IQ4_NL", 12, 18, np.random.default_rng(8), 4e4))
    with pytest.raises(GGUFError, match="compact"):  # rather than wider groups
        encoded(file, Policy("compact"))


def test_types_that_hold_no_weights_are_named(tmp_path: Path) -> None:
    kinds = {"blk.1.ffn_up.weight": ("I8", np.zeros((96, 64), np.int8).view(np.uint8))}
    file = read_gguf(Tiny(raw=kinds).write(tmp_path / "x.gguf"))
    for policy in POLICIES:
        with pytest.raises(InexactError) as caught:
            gguf_tensors(open_gguf(file).names, Policy(policy))
        assert [name for name, _, _ in caught.value.tensors] == ["blk.1.ffn_up.weight"]
        assert "blk.1.ffn_up.weight (I8)" in str(caught.value)


def test_large_matrices_are_converted_in_chunks_with_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import converters.quantize.encode as module

    blocks = random_blocks("Q4_K", 60, 144, np.random.default_rng(9), 0.001)
    file = one(tmp_path, "Q4_K", blocks, rows=30)
    whole = encoded(file, Policy("near"))
    monkeypatch.setattr(module, "CHUNK_WEIGHTS", 7 * 512)
    monkeypatch.setattr(module, "SAMPLE_WEIGHTS", 512)
    chunked = encoded(file, Policy("near"))
    assert chunked.layout == whole.layout
    assert chunked.error.rmse == pytest.approx(whole.error.rmse, rel=1e-6)
    for name, array in whole.arrays.items():
        np.testing.assert_array_equal(chunked.arrays[name], array)


def test_half_dtype_follows_the_file(tmp_path: Path) -> None:
    for kinds, expected in (
        ({"*": "BF16"}, "bfloat16"),
        ({"*": "F16"}, "float16"),
        ({"*": "BF16", "output.weight": "Q8_0"}, "float16"),
        ({}, "float16"),
    ):
        assert half_dtype(read_gguf(Tiny(kinds=kinds).write(tmp_path / "x.gguf"))) == expected


def test_unknown_policies_are_refused(tmp_path: Path) -> None:
    from mlxrun import convert

    source = Tiny().write(tmp_path / "x.gguf")
    with pytest.raises(ConversionError, match="exact, near, compact"):
        GGUFSource(source, policy="best")
    with pytest.raises(ParameterError, match="exact, near, compact"):
        convert(source, tmp_path / "out", policy="best")
    assert not (tmp_path / "out").exists()
