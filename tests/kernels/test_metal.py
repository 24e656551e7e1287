"""Metal's kernels on the CPU: the text that MLX would have compiled, over a shim."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from decoders import HERE, Decoders, compiler
from emulated import Emulator
from gpu_cases import LISTED, Weights, check, inputs
from tiny_models import Tiny

from converters.gguf.reader import read_gguf
from converters.gguf.types import GGMLType
from mlxrun.kernels.gpu import FLOATS, METAL, TYPES, Kernels
from mlxrun.kernels.interface import Matrix
from mlxrun.weights.blocks import BlockWeight


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> Decoders:
    return Decoders(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return Emulator(tmp_path_factory.mktemp("metal"))


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_products_rows_and_experts(emulator: Emulator, decoders: Decoders, kind: GGMLType) -> None:
    check(emulator, decoders, kind, mx.float32, whole=kind in LISTED)


@pytest.mark.parametrize("kind", LISTED, ids=lambda kind: kind.name)
def test_halves(emulator: Emulator, decoders: Decoders, kind: GGMLType) -> None:
    check(emulator, decoders, kind, mx.float16, whole=kind is GGMLType.Q4_K)


def test_bfloat16(emulator: Emulator, decoders: Decoders) -> None:
    check(emulator, decoders, GGMLType.Q4_K, mx.bfloat16, whole=False)


def test_the_order_of_threads_does_not_matter(emulator: Emulator, decoders: Decoders) -> None:
    """A barrier that is missing would let a thread read before, or after, another wrote."""
    first = check(emulator, decoders, GGMLType.Q6_K, mx.float32, whole=False)
    emulator.reversed = True
    try:
        second = check(emulator, decoders, GGMLType.Q6_K, mx.float32, whole=False)
    finally:
        emulator.reversed = False
    for one, other in zip(first, second, strict=True):
        assert mx.array_equal(one.got, other.got), one.name


def test_no_byte_is_read_or_written_outside_the_arrays() -> None:
    """With the address and undefined behavior sanitizers, which Python must be started with."""
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all"
    names = [
        subprocess.run(
            [compiler(), f"-print-file-name=lib{name}.so"], capture_output=True, text=True
        ).stdout.strip()
        for name in ("asan", "ubsan")
    ]
    if not all(Path(name).is_absolute() for name in names):
        pytest.skip("this compiler has no sanitizers to load before Python")
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(names),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parents[1])]),
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "gpu_cases.py"), "Q6_K", "IQ3_S", flags],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.stdout == "checked Q6_K IQ3_S\n", done.stderr[-3000:]


def test_shapes_are_not_compiled_in(emulator: Emulator, decoders: Decoders) -> None:
    kernels = Kernels(METAL, fused=TYPES, make=emulator.kernel)
    recorded = []
    for shape, rows in (((37, 512), 5), ((64, 1024), 8)):
        matrix = Weights(decoders, GGMLType.Q5_1, *shape).matrix
        with emulator.record():
            kernels.product([matrix])(mx.zeros((rows, shape[1])))
            recorded.append(dict(emulator.new))
    assert len(recorded[0]) == 1
    assert recorded[0] == recorded[1]


def test_what_is_not_a_number_stays_in_its_row(emulator: Emulator, decoders: Decoders) -> None:
    kernels = Kernels(METAL, fused=TYPES, make=emulator.kernel)
    weights = Weights(decoders, GGMLType.Q4_0, 37, 256)
    raw = np.array(weights.matrix.blocks)
    raw[5, 18:20] = [0x00, 0x7C]  # the second scale of row 5 is infinite
    product = kernels.product([Matrix(mx.array(raw), GGMLType.Q4_0, 256)])
    for rows in (3, 12):
        x, _ = inputs(np.random.default_rng(1), mx.float32, rows, 256)
        x[1, 40] = float("nan")
        with emulator.record():
            product(x)
        finite = np.isfinite(np.array(product(x)[0]))
        expected = np.ones_like(finite)
        expected[1], expected[:, 5] = False, False
        np.testing.assert_array_equal(finite, expected)


def test_norm_biases_gate_and_sum(emulator: Emulator, decoders: Decoders) -> None:
    kernels = Kernels(METAL, make=emulator.kernel)
    rng = np.random.default_rng(4)
    pair = [Weights(decoders, GGMLType.Q8_0, 24, 256, seed=seed) for seed in (0, 1)]
    x, _ = inputs(rng, mx.float32, 2, 3, 256)
    residual, bias = mx.ones((2, 3, 24)), mx.arange(24).astype(mx.float32)
    norm = (mx.full((256,), 0.5), 1e-6)
    matrices = [weights.matrix for weights in pair]
    run = kernels.product(matrices, norm=norm, biases=[bias, None], gate="silu", residual=True)
    with emulator.record():
        run(x, residual)
    first, second = (
        mx.fast.rms_norm(x, *norm) @ mx.array(weights.values.astype(np.float32)).T
        for weights in pair
    )
    first = first + bias
    wanted = first * mx.sigmoid(first) * second + residual
    (got,) = run(x, residual)
    np.testing.assert_allclose(np.array(got), np.array(wanted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", FLOATS, ids=lambda kind: kind.name)
def test_floats_are_multiplied_by_mlx(decoders: Decoders, kind: GGMLType) -> None:
    kernels = Kernels(METAL, make=lambda **_: pytest.fail("a kernel"))
    values = np.random.default_rng(2).standard_normal((2, 6, 32)).astype(np.float32)
    plain = mx.array(values).astype(FLOATS[kind])
    order = mx.array(np.array([5, 0, 3, 1, 2, 4], np.int32))
    raw = plain.view(mx.uint8)
    x, chosen = mx.ones((1, 1, 1, 32)), mx.array([[1, 0, 1]])
    wanted = np.array(plain.astype(mx.float32))[:, np.array(order)]
    matrix = Matrix(raw[0], kind, 32, order)
    np.testing.assert_allclose(kernels.product([matrix])(x[0])[0][0, 0], wanted[0].sum(-1), 1e-5)
    np.testing.assert_array_equal(kernels.dequantize(matrix), wanted[0])
    np.testing.assert_array_equal(kernels.take(matrix)(mx.array([2])), wanted[0][[2]])
    got = kernels.experts([Matrix(raw, kind, 32, order)])(x, chosen)[0]
    np.testing.assert_allclose(got[0, :, 0], wanted[[1, 0, 1]].sum(-1), 1e-5)


def test_a_tensor_of_a_file(tmp_path: Path, emulator: Emulator) -> None:
    source = Tiny(kinds={"*": "Q4_1"}).write(tmp_path / "x.gguf")
    kernels = Kernels(METAL, make=emulator.kernel)
    tensors = read_gguf(source).tensors
    tensor = next(each for each in tensors if each.type is GGMLType.Q4_1)
    blocks = kernels.map(tensor)
    assert blocks.shape == (tensor.shape[0], tensor.shape[1] // 32 * 20)
    assert np.array(blocks).tobytes() == tensor.raw().tobytes()


def test_other_numbers_are_refused(decoders: Decoders) -> None:
    matrix = Weights(decoders, GGMLType.Q4_K, 8, 256).matrix
    kernels = Kernels(METAL, make=lambda **_: pytest.fail("a kernel"))
    with pytest.raises(TypeError, match="int32"):
        kernels.product([matrix])(mx.zeros((1, 256), mx.int32))


def test_a_weight_of_blocks_with_these_kernels(emulator: Emulator, decoders: Decoders) -> None:
    weights = Weights(decoders, GGMLType.Q4_K, 20, 256, ordered=True)
    stack = Weights(decoders, GGMLType.Q4_K, 4, 20, 256)
    kernels: Any = Kernels(METAL, make=emulator.kernel)
    one, many = (BlockWeight("w", each.matrix, kernels, 2) for each in (weights, stack))
    bias, factor = mx.arange(20).astype(mx.float16), 0.5
    scaled = replace(one, factor=mx.array([factor]))
    x, plain = inputs(np.random.default_rng(9), mx.float16, 1, 2, 256)
    chosen = np.array([[[2, 0], [3, 3]]])
    ids = mx.array([[4, 19]])

    def results() -> list[mx.array]:
        return [
            one.product(bias)(x),
            many.gathered_product()(x[:, :, None, None], mx.array(chosen))[..., 0, :],
            scaled.take(ids, mx.float32),
            scaled.dequantize(mx.float32),
        ]

    with emulator.record():
        results()
    wanted = [
        plain @ weights.values.T + np.arange(20),
        np.einsum("btc,btkrc->btkr", plain, stack.values[chosen]),
        factor * weights.values[np.array(ids)],
        factor * weights.values,
    ]
    for got, expected in zip(results(), wanted, strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-3 * np.abs(expected).max())
