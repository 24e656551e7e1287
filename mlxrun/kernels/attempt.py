"""Test compiled objects before they are cached: ``python -m``, as they may crash the process.

Reads JSON, names to paths of objects; ends with 0 where all results are right.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from converters.errors import GGUFError
from converters.gguf.file import GGUFTensor, OpenFile
from converters.gguf.types import BLOCKS, GGMLType
from converters.quantize.encode import plain_floats
from mlxrun.kernels.interface import HeadsSpec, Matrix
from mlxrun.kernels.native import Kernels, Native

ROWS, COLUMNS = 24, 512
# Random rows, of which those with infinite or large scales are left out.
TRIES, LARGE = 64, 1e15
# Bounds of the error of products with activations of 24 bits, and of the operations of a step.
PRODUCT, STEP = 1e-11, 1e-5


class WrongError(Exception):
    """A kernel computes wrong results."""


def try_all(paths: Mapping[str, Path]) -> None:
    """Compare each type with the decoders in Python, and the operations of a step with MLX's.

    Args:
        paths: of "core", "glue" and each type.
    """
    types = {GGMLType[name]: path for name, path in paths.items() if name.isupper()}
    kernels = Kernels(Native(paths["core"], paths["glue"], types))
    with tempfile.TemporaryDirectory() as folder:
        for tensor in _tensors(Path(folder), types):
            _try_type(kernels, tensor)
    _try_step(kernels)


def _tensors(folder: Path, types: Iterable[GGMLType]) -> Iterator[GGUFTensor]:
    """A matrix of random bytes of each type, in a file of its own."""
    random = np.random.default_rng(0)
    for kind in types:
        numbers, size = BLOCKS[kind]
        nbytes, path = COLUMNS // numbers * size, folder / kind.name
        path.write_bytes(random.bytes(nbytes * TRIES))
        opened = OpenFile(os.open(path, os.O_RDONLY))
        many = GGUFTensor(kind.name, (TRIES, COLUMNS), kind, nbytes * TRIES, 0, path, 0, opened)
        good = [many.rows(i, 1, kind.name).raw() for i in range(TRIES) if _is_finite(many, i)]
        while len(good) < ROWS:  # without a bit that all infinite and very large scales have
            good.append(np.frombuffer(random.bytes(nbytes), np.uint8) & np.uint8(0xBF))
        path.write_bytes(b"".join(row.tobytes() for row in good[:ROWS]))
        yield many.rows(0, ROWS, kind.name)


def _is_finite(tensor: GGUFTensor, row: int) -> bool:
    try:
        with np.errstate(all="ignore"):
            values = plain_floats(tensor.rows(row, 1, tensor.name))
        return bool((np.abs(values) < LARGE).all())
    except GGUFError:
        return False


def _try_type(kernels: Kernels, tensor: GGUFTensor) -> None:
    expected = plain_floats(tensor)
    matrix = Matrix(kernels.map(tensor), tensor.type, COLUMNS)
    if not np.array_equal(np.array(kernels.dequantize(matrix)), expected):
        raise WrongError(f"{tensor.name} decodes to other numbers")
    product = kernels.product([matrix], 3)
    for count in (1, 5, 40):
        x = mx.random.normal((count, COLUMNS))
        eager, recorded = product(x)[0], mx.compile(lambda x: product(x)[0] * 1)(x)
        if not mx.array_equal(eager, recorded):
            raise WrongError(f"products of {tensor.name} differ in a compiled graph")
        _compare(
            f"products of {tensor.name}",
            eager,
            np.array(x) @ expected.astype(np.float64).T,
            PRODUCT,
        )


def _try_step(kernels: Kernels) -> None:
    x, weight = mx.random.normal((2, 3, 64)), mx.random.normal((64,))
    norm = kernels.rms_norm(weight, 1e-5)(x)
    _compare("RMS norm", norm, np.array(mx.fast.rms_norm(x, weight, 1e-5)), STEP)
    gate = kernels.gated("silu")(x, norm)
    _compare("SwiGLU", gate, np.array(x * mx.sigmoid(x) * norm), STEP)
    _compare("softmax", kernels.softmax(x), np.array(mx.softmax(x, axis=-1)), STEP)
    frequencies = mx.array([10000.0 ** (-i / 8) for i in range(8)])
    (q,) = kernels.heads([HeadsSpec(4, 16, frequencies=frequencies)])([x], 5)
    plain = x.reshape(2, 3, 4, 16).swapaxes(1, 2)
    turned = mx.fast.rope(plain, 16, traditional=False, base=10000.0, scale=1.0, offset=5)
    _compare("rotation", q, np.array(turned), STEP)
    k, v = mx.random.normal((2, 2, 2, 7, 16))
    mixed = kernels.attention(0.25)(q, k, v, "causal")
    causal = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.25, mask="causal")
    _compare("attention", mixed, np.array(causal), STEP)


def _compare(name: str, found: mx.array, expected: npt.NDArray[np.floating], bound: float) -> None:
    difference = np.array(found).astype(np.float64) - expected
    error = np.square(difference).sum() / max(np.square(expected.astype(np.float64)).sum(), 1e-30)
    if not error <= bound:
        raise WrongError(f"{name} is off by {error:.1e}")


if __name__ == "__main__":
    try:
        try_all({name: Path(path) for name, path in json.load(sys.stdin).items()})
    except Exception as error:  # the other process reads the last line
        sys.exit(f"error: {' '.join(str(error).split()) or type(error).__name__}")
