"""Products over GGUF blocks on the CPU, in C++ and without MLX: against float64."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import threading
from pathlib import Path
from typing import Any

import decoders
import gguf
import native_kernels as native
import numpy as np
import numpy.typing as npt
import pytest
from tiny_models import HALF_SCALES, Kind, random_blocks

from converters.gguf.quants import CODECS
from converters.gguf.types import BLOCKS, GGMLType

FLOATS = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
CODED = sorted(set(CODECS) | {GGMLType.MXFP4, GGMLType.NVFP4})
TYPES = [*CODED, *FLOATS]
#: Every way in which a type's blocks, scales and codes differ; other builds are tried with these.
FORMS = [
    GGMLType[name]
    for name in ("Q4_K", "Q6_K", "Q2_K", "Q5_1", "IQ4_XS", "NVFP4", "TQ1_0", "IQ3_XXS", "F16")
]
#: The error of products in 8, 16 and 24 bits: the squares' sum, as a share of the products'.
BOUNDS = {1: 5e-4, 2: 1e-8, 3: 1e-12}
ROWS = (1, 2, 3, 7, 8, 16, 33, 128)
WIDTHS = (1, 15, 16, 17, 100)
BEST = native.processor()[0]
SCALED = [kind for kind in CODED if kind.name in HALF_SCALES]
ARM = [GGMLType[name] for name in ("Q6_K", "IQ4_XS", "IQ3_XXS")]
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi", "-Werror"]

Array = npt.NDArray[Any]


def named(kinds: list[GGMLType]) -> list[str]:
    return [kind.name for kind in kinds]


def weights(kind: GGMLType, rows: int, columns: int, seed: int = 0) -> tuple[Array, Array]:
    """Blocks of a matrix (rows, bytes), and the same as numbers (rows, columns)."""
    rng = np.random.default_rng((int(kind), seed))
    size, length = BLOCKS[kind]
    if kind in FLOATS:
        blocks = rng.standard_normal((rows, columns)).astype(np.float32)
        if kind == GGMLType.F16:
            blocks = blocks.astype(np.float16)
        if kind == GGMLType.BF16:
            blocks = (blocks.view(np.uint32) >> 16).astype(np.uint16)
    else:
        count = rows * columns // size
        blocks = random_blocks(kind.name, count, length, rng, scale=0.01)
    blocks = np.ascontiguousarray(blocks).view(np.uint8).reshape(rows, -1)
    return blocks, dequantized(kind, blocks).reshape(rows, columns)


def dequantized(kind: GGMLType, blocks: Array) -> Array:
    """The gguf package's weights; it has none for two types."""
    if kind == GGMLType.F32:
        return blocks.view(np.float32)
    with np.errstate(all="ignore"):
        if kind in (GGMLType.Q1_0, GGMLType.Q2_0):
            return CODECS[kind].decode(blocks).values()
        return gguf.quants.dequantize(blocks, Kind[kind.name])


def columns_of(kind: GGMLType) -> tuple[int, ...]:
    """Widths that fill super-blocks of 256, and that do not where blocks are smaller."""
    return {
        1: (5, 77, 544),
        32: (32, 288, 544),
        64: (64, 320, 576),
        128: (128, 384, 512),
        256: (256, 768),
    }[BLOCKS[kind][0]]


class Reference:
    """Products x (n, columns) by w (m, columns) in float64, and the squares that they would have on
    average if signs were random: one product may be near 0 by chance.
    """

    def __init__(self, x: Array, w: Array) -> None:
        x, w = x.astype(np.float64), w.astype(np.float64)
        self.products, self.squares = x @ w.T, (x**2) @ (w**2).T

    def error(self, got: Array, rows: Array | slice = slice(None)) -> float:
        """NMSE of products of the first rows of x with some rows of w."""
        n = len(got)
        difference = got - self.products[:n, rows]
        return float((difference**2).sum() / self.squares[:n, rows].sum())


def bounds_of(kind: GGMLType) -> dict[int, float]:
    return dict.fromkeys(BOUNDS, 1e-12) if kind in FLOATS else BOUNDS


def added(kind: GGMLType, isa: str = BEST) -> str:
    native.add(isa, *named(TYPES if isa == BEST else FORMS))
    return isa


def builds() -> list[Any]:
    """The best build with every type, others with one of each form."""
    return [
        pytest.param(isa, kind, id=f"{isa}-{kind.name}")
        for isa in native.processor()
        for kind in (TYPES if isa == BEST else FORMS)
    ]


@pytest.mark.parametrize(("isa", "kind"), builds())
def test_rows_are_the_gguf_packages(isa: str, kind: GGMLType) -> None:
    added(kind, isa)
    for columns in columns_of(kind):
        blocks, w = weights(kind, 19, columns)
        order = np.random.default_rng(1).permutation(19).astype(np.int32)
        ids = [3, 18, 0, 3]
        rows = native.take(isa, native.matrix(blocks, kind), columns, ids)
        np.testing.assert_array_equal(rows, w[ids])
        rows = native.take(isa, native.matrix(blocks, kind, order), columns, ids)
        np.testing.assert_array_equal(rows, w[order[ids]])


@pytest.mark.parametrize(("isa", "kind"), builds())
def test_any_bytes_are_the_gguf_packages_rows(isa: str, kind: GGMLType) -> None:
    """Infinite, subnormal, negative and missing scales, too."""
    added(kind, isa)
    size, length = BLOCKS[kind]
    columns = 512
    rng = np.random.default_rng(int(kind))
    blocks = rng.integers(0, 256, (400, columns // size * length), dtype=np.uint8)
    rows = native.take(isa, native.matrix(blocks, kind), columns, range(400))
    np.testing.assert_array_equal(rows, dequantized(kind, blocks).reshape(rows.shape))


@pytest.mark.parametrize(("isa", "kind"), builds())
def test_products_are_within_their_bounds(isa: str, kind: GGMLType) -> None:
    """Any number of rows of the input and of the matrix, in any order."""
    added(kind, isa)
    rng = np.random.default_rng(2)
    order = rng.permutation(max(WIDTHS)).astype(np.int32)
    for columns in columns_of(kind):
        blocks, w = weights(kind, max(WIDTHS), columns)
        inputs = rng.standard_normal((max(ROWS), columns)).astype(np.float32)
        matrices = [
            (native.Matrix(native.address(blocks), native.address(ordered), kind, width), ordered)
            for width in WIDTHS
            for ordered in (None, order)
        ]
        reference = Reference(inputs, w)
        for rows in ROWS:
            for planes, bound in bounds_of(kind).items():
                outs = native.product(isa, [m for m, _ in matrices], inputs[:rows], planes)
                for y, (m, ordered) in zip(outs, matrices, strict=True):
                    chosen = slice(m.rows) if ordered is None else ordered[: m.rows]
                    case = (columns, rows, m.rows, planes, ordered is None)
                    assert reference.error(y, chosen) <= bound, case


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the core, some types and a program that calls them, for ARM."""
    compiler = "aarch64-linux-gnu-g++"
    if not (shutil.which(compiler) and shutil.which("qemu-aarch64")):
        pytest.skip("needs a compiler for ARM and an emulator")
    folder = tmp_path_factory.mktemp("arm")
    shared = ["-O1", "-fPIC", "-shared", "-fvisibility=hidden", *native.FLAGS["neon"]]
    jobs = {"core.so": [*shared, "core.cpp", "step.cpp"]}
    for kind in ARM:
        jobs[f"{kind.name}.so"] = [*shared, "format.cpp", f"-DKERNELS_TYPE={kind.name}"]
    jobs["driver"] = [str(Path(__file__).with_name("driver.cpp"))]
    for name, job in jobs.items():
        command = [compiler, "-std=c++17", *WARNINGS, *job, "-ldl", "-o", str(folder / name)]
        subprocess.run(command, cwd=native.SOURCES, check=True)
    return folder


@pytest.mark.parametrize("kind", ARM, ids=named(ARM))
def test_products_on_arm(arm: Path, kind: GGMLType) -> None:
    rng = np.random.default_rng(3)
    calls = b""
    expected: list[tuple[int, Array, Array]] = []
    for columns in columns_of(kind):
        blocks, w = weights(kind, 19, columns)
        ids = np.arange(19, dtype=np.int32)
        head = struct.pack("7i", 1, 0, 19, columns, 19, kind, blocks.nbytes)
        calls += head + blocks.tobytes() + ids.tobytes()
        expected.append((0, w, w))
        for rows in (1, 2, 3, 7, 17):
            x = rng.standard_normal((rows, columns)).astype(np.float32)
            for planes in BOUNDS:
                head = struct.pack("7i", 0, planes, rows, columns, 19, kind, blocks.nbytes)
                calls += head + blocks.tobytes() + x.tobytes()
                expected.append((planes, x, w))
    (arm / "in").write_bytes(calls)
    command = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", "./driver", "./core.so"]
    subprocess.run([*command, f"./{kind.name}.so", "in", "out"], cwd=arm, check=True)
    numbers = np.fromfile(arm / "out", np.float32)
    for planes, x, w in expected:
        count = w.size if planes == 0 else len(x) * len(w)
        got, numbers = numbers[:count], numbers[count:]
        if planes == 0:
            np.testing.assert_array_equal(got.reshape(w.shape), w)
        else:
            got = got.reshape(len(x), len(w))
            assert Reference(x, w).error(got) <= bounds_of(kind)[planes]


@pytest.mark.parametrize(
    ("kind", "description"),
    [
        (GGMLType.Q5_K, "12, 256, 176, 32, 0, 31, 0, true, blocks_q5_k"),
        (GGMLType.IQ2_S, "12, 256, 82, 16, -43, 43, 0, false, blocks_iq2_s"),
        (GGMLType.MXFP4, "12, 32, 17, 32, -12, 12, 0, false, blocks_mxfp4"),
    ],
    ids=["minimum", "16", "small"],
)
def test_the_decoder_in_blocks_h_is_enough(
    tmp_path: Path, kind: GGMLType, description: str
) -> None:
    """A type that has no other, in the place of Q4_K."""
    native.add(BEST, *named(TYPES))
    command = [decoders.compiler(), "-std=c++17", "-O1", "-fPIC", "-shared", *WARNINGS]
    command += [*native.FLAGS[BEST], f"-DKERNELS_TYPE=Plain<{description}>", "format.cpp"]
    subprocess.run([*command, "-o", str(tmp_path / "x.so")], cwd=native.SOURCES, check=True)
    library = ctypes.CDLL(str(tmp_path / "x.so"))
    library.mlxrun_format.restype = ctypes.c_void_p
    columns = columns_of(kind)[-1]
    blocks, w = weights(kind, 37, columns)
    x = np.random.default_rng(2).standard_normal((33, columns)).astype(np.float32)
    matrix = native.Matrix(native.address(blocks), None, GGMLType.Q4_K, 37)
    try:
        assert native.core(BEST).add(library.mlxrun_format()) == 0
        np.testing.assert_array_equal(native.take(BEST, matrix, columns, range(37)), w)
        for rows in (1, 2, 33):
            for planes, bound in BOUNDS.items():
                (y,) = native.product(BEST, [matrix], x[:rows], planes)
                assert Reference(x, w).error(y) <= bound
    finally:
        native.add.__wrapped__(BEST, "Q4_K")


@pytest.mark.parametrize("isa", native.processor())
def test_compilers_have_nothing_to_say(isa: str) -> None:
    """All types at once; the compiler only looks."""
    text = '#include "products.h"\nnamespace kernels {\n'
    for kind in TYPES:
        name = "product_floats" if kind in FLOATS else "product"
        text += f"template void {name}<{kind.name}>(const Piece*);\n"
    command = ["-std=c++17", "-fsyntax-only", *WARNINGS, *native.FLAGS[isa], "-x", "c++", "-"]
    for compiler in filter(shutil.which, ("g++", "clang++")):
        found = subprocess.run(
            [compiler, *command], input=text + "}\n", cwd=native.SOURCES, text=True
        )
        assert found.returncode == 0


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_results_do_not_depend_on_the_number_of_threads(rows: int) -> None:
    kinds = [GGMLType.Q4_K, GGMLType.Q6_K, GGMLType.Q8_0, GGMLType.F16]
    matrices, kept = [], []
    for kind in kinds:
        added(kind)
        blocks, _ = weights(kind, 211, 768)
        kept.append(blocks)
        matrices.append(native.matrix(blocks, kind))
    x = np.random.default_rng(4).standard_normal((rows, 768)).astype(np.float32)
    results = []
    for threads in (1, 2, 3, 5):
        native.core(BEST).threads(threads, 2e-5, 0)
        results.append(native.product(BEST, matrices, x, 2))
    native.core(BEST).threads(2, 2e-5, 0)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("rows", [1, 9])
def test_several_matrices_of_one_normed_input(rows: int) -> None:
    """Mixed types, biases, orders of rows; the input is normalized first."""
    kinds = [GGMLType.Q4_K, GGMLType.F16, GGMLType.Q6_K]
    rng = np.random.default_rng(5)
    x = rng.standard_normal((rows, 512)).astype(np.float32)
    norm = rng.standard_normal(512).astype(np.float32)
    matrices, kept, expected, biases = [], [], [], []
    for i, kind in enumerate(kinds):
        added(kind)
        blocks, w = weights(kind, 24 + 16 * i + i, 512)
        order = rng.permutation(len(blocks)).astype(np.int32)
        bias = rng.standard_normal(len(blocks)).astype(np.float32) if i != 1 else None
        kept += [blocks, order]
        matrices.append(native.matrix(blocks, kind, order))
        biases.append(bias)
        expected.append((w[order].astype(np.float64), 0 if bias is None else bias))
    outs = native.product(BEST, matrices, x, 3, normed=True, norm=norm, eps=1e-5, biases=biases)
    y = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5) * norm
    for out, (w, add) in zip(outs, expected, strict=True):
        np.testing.assert_allclose(out, y @ w.T + add, rtol=0, atol=2e-5 * np.abs(y @ w.T).max())


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_a_gate_joins_two_matrices_and_a_residual_is_added(rows: int) -> None:
    added(GGMLType.Q4_K)
    rng = np.random.default_rng(6)
    (a, wa), (b, wb) = weights(GGMLType.Q4_K, 45, 256), weights(GGMLType.Q8_0, 45, 256)
    x = rng.standard_normal((rows, 256)).astype(np.float32)
    residual = rng.standard_normal((rows, 45)).astype(np.float32)
    biases = [rng.standard_normal(45).astype(np.float32) for _ in range(2)]
    matrices = [native.matrix(a, GGMLType.Q4_K), native.matrix(b, GGMLType.Q8_0)]
    (got,) = native.product(
        BEST, matrices, x, 3, gate=native.GATES["silu"], biases=biases, residual=residual
    )
    g, u = (x.astype(np.float64) @ w.T + c for w, c in zip((wa, wb), biases, strict=True))
    true = g / (1 + np.exp(-g)) * u + residual
    np.testing.assert_allclose(got, true, rtol=0, atol=1e-5 * np.abs(true).max())


@pytest.mark.parametrize("per_token", [1, 3])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 30])
def test_experts_by_index(per_token: int, gated: bool, tokens: int) -> None:
    added(GGMLType.Q4_K)
    rng = np.random.default_rng(7)
    experts, width, columns = 5, 21, 256
    kinds = [GGMLType.Q4_K, GGMLType.Q6_K]
    made = [weights(kind, experts * width, columns) for kind in kinds]
    stacks = [blocks.reshape(experts, width, -1) for blocks, _ in made]
    numbers = [w.reshape(experts, width, columns).astype(np.float64) for _, w in made]
    biases = [rng.standard_normal((experts, width)).astype(np.float32) for _ in kinds]
    x = rng.standard_normal((tokens, per_token, columns)).astype(np.float32)
    # Expert 4 has nothing to do, and one may be chosen twice.
    chosen = rng.integers(0, experts - 1, (tokens, 3)).astype(np.uint32)
    outs = native.experts(
        BEST,
        [native.matrix(s, k) for s, k in zip(stacks, kinds, strict=True)],
        x,
        chosen,
        experts,
        3,
        biases=biases,
        gate=native.GATES["silu"] if gated else 0,
    )
    each = np.broadcast_to(x, (tokens, 3, columns)).astype(np.float64)
    true = [
        np.einsum("tkc,tkrc->tkr", each, w[chosen]) + b[chosen]
        for w, b in zip(numbers, biases, strict=True)
    ]
    if gated:
        true = [true[0] / (1 + np.exp(-true[0])) * true[1]]
    assert len(outs) == len(true)
    for got, want in zip(outs, true, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("kind", TYPES, ids=named(TYPES))
def test_what_is_not_finite_passes_on(kind: GGMLType) -> None:
    """To all outputs of its row of the input, and to no other row's."""
    isa, columns = added(kind), columns_of(kind)[-1]
    blocks, _ = weights(kind, 18, columns)
    for bad in (np.nan, np.inf, -np.inf):
        for rows in (1, 2, 9):
            x = np.random.default_rng(8).standard_normal((rows, columns)).astype(np.float32)
            x[rows // 2, columns - 20] = bad
            for planes in BOUNDS:
                (y,) = native.product(isa, [native.matrix(blocks, kind)], x, planes)
                assert not np.isfinite(y[rows // 2]).any()
                assert np.isfinite(np.delete(y, rows // 2, 0)).all()


@pytest.mark.parametrize("kind", SCALED, ids=named(SCALED))
def test_scales_that_are_not_finite_pass_on(kind: GGMLType) -> None:
    """To the outputs of their row of the matrix."""
    isa, columns = added(kind), columns_of(kind)[-1]
    for scale in (0x7C00, 0xFC00, 0x7E00):
        blocks, _ = weights(kind, 18, columns)
        last = blocks[4, -BLOCKS[kind][1] :]
        for at in HALF_SCALES[kind.name]:
            last[at : at + 2] = np.array([scale], np.uint16).view(np.uint8)
        for rows in (1, 9):
            x = np.random.default_rng(9).standard_normal((rows, columns)).astype(np.float32)
            for planes in BOUNDS:
                (y,) = native.product(isa, [native.matrix(blocks, kind)], x, planes)
                assert not np.isfinite(y[:, 4]).any()
                assert np.isfinite(np.delete(y, 4, 1)).all()


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30])
def test_tiny_and_huge_inputs(size: float) -> None:
    isa = added(GGMLType.Q8_0)
    blocks, w = weights(GGMLType.Q8_0, 16, 256)
    x = (size * np.random.default_rng(10).uniform(1, 2, (1, 256))).astype(np.float32)
    (y,) = native.product(isa, [native.matrix(blocks, GGMLType.Q8_0)], x, 3)
    true = x.astype(np.float64) @ w.astype(np.float64).T
    np.testing.assert_allclose(y, true, rtol=0, atol=max(1e-5 * np.abs(true).max(), 1e-36))


def test_an_input_of_zeros_gives_zeros() -> None:
    isa = added(GGMLType.Q4_K)
    blocks, _ = weights(GGMLType.Q4_K, 16, 256)
    for rows in (1, 9):
        x = np.zeros((rows, 256), np.float32)
        (y,) = native.product(isa, [native.matrix(blocks, GGMLType.Q4_K)], x, 2)
        np.testing.assert_array_equal(y, np.zeros((rows, 16)))


def test_several_callers_at_once() -> None:
    isa = added(GGMLType.Q4_K)
    blocks, _ = weights(GGMLType.Q4_K, 500, 1024)
    x = np.random.default_rng(11).standard_normal((4, 1, 1024)).astype(np.float32)
    matrix = native.matrix(blocks, GGMLType.Q4_K)
    alone = [native.product(isa, [matrix], row, 2)[0] for row in x]
    wrong = []

    def call(i: int) -> None:
        for _ in range(50):
            (y,) = native.product(isa, [matrix], x[i], 2)
            if not np.array_equal(y, alone[i]):
                wrong.append(i)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forks_child_has_a_pool_of_its_own() -> None:
    isa = added(GGMLType.Q4_K)
    blocks, _ = weights(GGMLType.Q4_K, 500, 1024)
    x = np.random.default_rng(12).standard_normal((1, 1024)).astype(np.float32)
    matrix = native.matrix(blocks, GGMLType.Q4_K)
    (before,) = native.product(isa, [matrix], x, 2)
    child = os.fork()
    if not child:
        (y,) = native.product(isa, [matrix], x, 2)
        os._exit(0 if np.array_equal(y, before) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    np.testing.assert_array_equal(native.product(isa, [matrix], x, 2)[0], before)


def test_workers_sleep_when_there_is_nothing_to_do() -> None:
    isa = added(GGMLType.Q4_K)
    blocks, _ = weights(GGMLType.Q4_K, 500, 1024)
    x = np.ones((1, 1024), np.float32)
    native.product(isa, [native.matrix(blocks, GGMLType.Q4_K)], x, 2)
    before = sum(os.times()[:2])
    threading.Event().wait(0.5)
    assert sum(os.times()[:2]) - before < 0.25


def test_objects_of_another_version_are_refused() -> None:
    other = np.full(16, -1, np.int32)
    assert native.core(BEST).add(other.ctypes.data) == -1
    assert not native.core(BEST).known(99)
