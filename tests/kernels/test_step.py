"""The operations of a step: norms, heads, attention, gates, softmax, against float64."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import native_kernels
import numpy as np
import numpy.typing as npt
import pytest
from native_kernels import Array, address

from converters.gguf.types import GGMLType
from mlxrun.kernels.cpu_ops import gelu_tanh
from mlxrun.models.functions import GATES

Floats = npt.NDArray[np.float32]
_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


def structure(name: str, **fields: Any) -> Any:
    """A struct of kernels.h; a key names one field or, with spaces, several of a type."""
    listed = [(field, kind) for names, kind in fields.items() for field in names.split("__")]
    return type(name, (ctypes.Structure,), {"_fields_": listed})


RmsNorm = structure(
    "RmsNorm", x=_POINTER, rows__columns=_INT, eps=_FLOAT, weight__residual__out=_POINTER
)
Heads = structure(
    "Heads",
    x=_POINTER,
    batch_stride__token_stride=_LONG,
    batch__tokens__heads__dim__norm_at=_INT,
    eps=_FLOAT,
    norm=_POINTER,
    dims=_INT,
    scale=_FLOAT,
    traditional=_INT,
    frequencies__positions=_POINTER,
    shared=_INT,
    out=_POINTER,
)
Attention = structure(
    "Attention",
    q__k__v=_POINTER,
    batch__heads__kv_heads__tokens__keys__dim__value_dim=_INT,
    q_batch__q_head__q_token__k_batch__k_head__k_key__v_batch__v_head__v_key=_LONG,
    scale__softcap=_FLOAT,
    sinks__slopes=_POINTER,
    causal=_INT,
    mask=_POINTER,
    mask_batch__mask_token__mask_key=_LONG,
    out=_POINTER,
    out_batch__out_head__out_token=_LONG,
)
Gated = structure("Gated", gate=_INT, count=_LONG, a__b__out=_POINTER)
Softmax = structure("Softmax", x=_POINTER, rows__columns=_INT, out=_POINTER)


@pytest.fixture(scope="module", params=native_kernels.processor())
def core(request: pytest.FixtureRequest) -> native_kernels.Core:
    return native_kernels.core(request.param)


@pytest.fixture
def normal() -> Callable[..., Floats]:
    random = np.random.default_rng(0)
    return lambda *shape: random.standard_normal(shape).astype(np.float32)


def close(found: Array, exact: Array, bound: float = 1e-6) -> None:
    """Within ``bound`` of the largest value; not numbers where the other is not."""
    np.testing.assert_array_equal(np.isnan(found), np.isnan(exact))
    sure = np.isfinite(exact)
    np.testing.assert_array_equal(found[~sure], exact[~sure].astype(np.float32))
    if sure.any():
        worst = np.abs(found[sure] - exact[sure]).max()
        assert worst <= bound * np.abs(exact[sure]).max(), worst


def strides(x: Array) -> list[int]:
    """Of all axes but the last, which is contiguous, in numbers."""
    assert x.shape[-1] == 1 or x.strides[-1] == x.itemsize
    return [stride // x.itemsize for stride in x.strides[:-1]]


# ---- attention ----------------------------------------------------------------------------------


def attention(
    core: native_kernels.Core,
    q: Floats,
    k: Floats,
    v: Floats,
    scale: float,
    *,
    causal: bool = False,
    mask: Array | None = None,
    softcap: float = 0.0,
    sinks: Floats | None = None,
    slopes: Floats | None = None,
) -> Floats:
    """Of shapes as ``mx.fast.scaled_dot_product_attention`` has them."""
    (batch, heads, tokens, dim), (keys, width) = q.shape, v.shape[2:]
    out = np.full((batch, tokens, heads, width), 7, np.float32)
    call = Attention(
        address(q), address(k), address(v),
        batch, heads, k.shape[1], tokens, keys, dim, width,
        *strides(q), *strides(k), *strides(v),
        scale, softcap, address(sinks), address(slopes), causal,
    )  # fmt: skip
    if mask is not None:
        seen = np.broadcast_to(mask, (batch, 1, tokens, keys))
        call.mask, (call.mask_batch, _, call.mask_token, call.mask_key) = (
            address(seen),
            seen.strides,
        )
    call.out = address(out)
    call.out_batch, call.out_token, call.out_head = strides(out)
    core.attention(ctypes.byref(call))
    return out.swapaxes(1, 2)


def exact_attention(
    q: Floats,
    k: Floats,
    v: Floats,
    scale: float,
    *,
    causal: bool = False,
    mask: Array | None = None,
    softcap: float = 0.0,
    sinks: Floats | None = None,
    slopes: Floats | None = None,
) -> Array:
    group, tokens, keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = (np.repeat(x.astype(np.float64), group, axis=1) for x in (k, v))
    scores = q.astype(np.float64) * scale @ k.swapaxes(2, 3)
    if softcap:
        scores = np.tanh(scores / softcap) * softcap
    if slopes is not None:
        scores += slopes.astype(np.float64)[:, None, None] * np.arange(1 - keys, 1)
    seen = np.ones(scores.shape, bool)
    if mask is not None:
        seen &= mask
    if causal:
        seen &= np.arange(keys) <= np.arange(keys - tokens, keys)[:, None]
    scores = np.where(seen, scores, -np.inf)
    column = np.full((*scores.shape[:3], 1), -np.inf)
    if sinks is not None:
        column[:] = sinks[:, None, None]
    scores = np.concatenate([scores, column], axis=-1)
    top = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - np.where(top == -np.inf, 0, top))
    total = weights.sum(axis=-1, keepdims=True)
    return weights[..., :-1] / np.where(total == 0, 1, total) @ v


def window(tokens: int, keys: int, size: int) -> Array:
    positions, queries = np.arange(keys), np.arange(keys - tokens, keys)[:, None]
    return (positions <= queries) & (positions > queries - size)


SHAPES = {  # batch, heads, heads of keys, tokens, keys, dim, width of values
    "one token": (1, 9, 3, 1, 100, 64, 64),
    "one key": (1, 4, 4, 1, 1, 64, 64),
    "split keys": (2, 8, 2, 1, 1500, 64, 64),
    "few tokens": (1, 8, 4, 3, 700, 128, 128),
    "speculation, one head of keys": (1, 8, 1, 16, 300, 80, 96),
    "prefill": (2, 6, 2, 70, 70, 64, 64),
    "later part of a prompt": (1, 4, 2, 130, 300, 64, 64),
    "ragged": (1, 4, 4, 5, 33, 20, 13),
    "ragged prefill": (1, 3, 1, 40, 257, 13, 20),
    "many heads": (1, 71, 1, 2, 90, 64, 64),
    "wide": (1, 2, 1, 1, 600, 256, 192),
    "blocks of queries": (1, 16, 2, 60, 200, 32, 32),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", ["all", "causal", "rows", "window", "softcap", "sinks", "slopes"])
def test_attention(
    core: native_kernels.Core, normal: Callable[..., Floats], shape: tuple[int, ...], kind: str
) -> None:
    batch, heads, kv_heads, tokens, keys, dim, width = shape
    # Queries by head and token as a projection has them; keys and values of a larger buffer.
    q = normal(batch, tokens, heads, dim).swapaxes(1, 2)
    k = normal(batch, kv_heads, keys + 7, dim)[:, :, :keys]
    v = normal(batch, kv_heads, keys + 3, width)[:, :, :keys]
    ends = np.linspace(keys, max(1, keys // 3), batch).astype(int)
    options: dict[str, Any] = {
        "all": {},
        "causal": {"causal": True},
        "rows": {"mask": np.arange(keys) < ends.reshape(-1, 1, 1, 1)},
        "window": {"mask": window(tokens, keys, 20)},
        "softcap": {"softcap": 2.0, "causal": True},
        "sinks": {"sinks": normal(heads), "mask": window(tokens, keys, 150)},
        "slopes": {"slopes": np.exp2(-np.arange(heads) / 4).astype(np.float32), "causal": True},
    }[kind]
    found = attention(core, q, k, v, dim**-0.5, **options)
    close(found, exact_attention(q, k, v, dim**-0.5, **options))


def test_attention_is_mlxs(core: native_kernels.Core, normal: Callable[..., Floats]) -> None:
    q, k, v, sinks = normal(1, 8, 40, 64), normal(1, 2, 40, 64), normal(1, 2, 40, 64), normal(8)
    arrays = [mx.array(x) for x in (q, k, v)]
    for mask in (True, False):
        mlxs = mx.fast.scaled_dot_product_attention(
            *arrays, scale=0.125, mask="causal" if mask else None, sinks=mx.array(sinks)
        )
        close(attention(core, q, k, v, 0.125, causal=mask, sinks=sinks), np.array(mlxs))


def test_who_sees_no_key_gets_zeros(
    core: native_kernels.Core, normal: Callable[..., Floats]
) -> None:
    q, k, v = normal(1, 4, 3, 32), normal(1, 2, 50, 32), normal(1, 2, 50, 32)
    mask = np.ones((3, 50), bool)
    mask[1] = False
    for sinks in (None, normal(4)):
        found = attention(core, q, k, v, 0.2, mask=mask, sinks=sinks)
        assert (found[:, :, 1] == 0).all()
        close(found, exact_attention(q, k, v, 0.2, mask=mask, sinks=sinks))


@pytest.mark.parametrize("tokens", [1, 40])
def test_no_number_is_never_hidden(
    core: native_kernels.Core, normal: Callable[..., Floats], tokens: int
) -> None:
    """Scores that are no numbers, or too large for one, make their query's output no number."""
    q, k, v = normal(1, 4, tokens, 64), normal(1, 4, 40, 64), normal(1, 4, 40, 64)
    k[0, 1, 7, 3] = np.nan
    q[0, 2, 0, 0], k[0, 2, :, 0] = -1e30, 1e30  # all scores of one query are minus infinity
    q[0, 3, 0, 0], k[0, 3, 9, 0] = 1e30, 1e30
    found = attention(core, q, k, v, 0.125)
    assert not np.isnan(found[:, 0]).any()
    assert np.isnan(found[:, 1]).all()
    assert np.isnan(found[:, 2:, 0]).all()
    assert not np.isnan(found[:, 2:, 1:]).any()
    hidden = np.arange(40) != 7
    found = attention(core, q[:, :2], k[:, :2], v[:, :2], 0.125, mask=hidden)
    assert not np.isnan(found).any()


def test_threads_do_not_change_results(
    core: native_kernels.Core, normal: Callable[..., Floats]
) -> None:
    decode = normal(1, 8, 1, 64), normal(1, 2, 3000, 64), normal(1, 2, 3000, 64)
    prefill = normal(1, 8, 200, 64), normal(1, 2, 200, 64), normal(1, 2, 200, 64)
    results = []
    for threads in (1, 2, 5):
        core.threads(threads, 0, 0)
        results.append([attention(core, *x, 0.125, causal=True) for x in (decode, prefill)])
    core.threads(2, 2e-5, 0)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


# ---- norms and heads ----------------------------------------------------------------------------


def exact_norm(x: Array, weight: Floats | None, eps: float) -> Array:
    x = x.astype(np.float64)
    normed = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
    return normed if weight is None else normed * weight


def rms_norm(
    core: native_kernels.Core,
    x: Floats,
    weight: Floats | None = None,
    residual: Floats | None = None,
) -> Floats:
    out = np.full(x.shape, 7, np.float32)
    core.rms_norm(
        ctypes.byref(
            RmsNorm(address(x), *x.shape, 1e-5, address(weight), address(residual), address(out))
        )
    )
    return out


@pytest.mark.parametrize("columns", [1, 7, 64, 576, 4097])
def test_rms_norm(core: native_kernels.Core, normal: Callable[..., Floats], columns: int) -> None:
    x, weight, residual = normal(37, columns) * 5, normal(columns), normal(37, columns)
    close(rms_norm(core, x), exact_norm(x, None, 1e-5))
    close(rms_norm(core, x, weight), exact_norm(x, weight, 1e-5))
    close(rms_norm(core, x, None, residual), exact_norm(x, None, 1e-5) + residual)
    close(rms_norm(core, x, weight, residual), exact_norm(x, weight, 1e-5) + residual)


def test_rms_norm_of_what_is_no_number(
    core: native_kernels.Core, normal: Callable[..., Floats]
) -> None:
    x = normal(4, 64)
    x[0, 0], x[1, 1], x[2] = np.nan, np.inf, 1e30
    close(rms_norm(core, x), np.array(mx.fast.rms_norm(mx.array(x), None, 1e-5)))


def heads(
    core: native_kernels.Core,
    inputs: list[Floats],
    counts: list[int],
    positions: npt.NDArray[np.int32],
    frequencies: Floats,
    *,
    norm_at: int = 0,
    weight: Floats | None = None,
    traditional: bool = False,
) -> list[Floats]:
    """Projections (B, T, H D) to heads (B, H, T, D)."""
    batch, tokens = inputs[0].shape[:2]
    outs = [
        np.full((batch, count, tokens, x.shape[2] // count), 7, np.float32)
        for x, count in zip(inputs, counts, strict=True)
    ]
    parts = [
        Heads(
            address(x), *strides(x), batch, tokens, count, out.shape[3], norm_at, 1e-6,
            address(weight), 2 * frequencies.size, 0.5, traditional, address(frequencies),
            address(positions), positions.size == 1, address(out),
        )
        for x, count, out in zip(inputs, counts, outs, strict=True)
    ]  # fmt: skip
    core.heads((Heads * len(parts))(*parts), len(parts))
    return outs


def exact_rotation(
    x: Array, positions: npt.NDArray[np.int32], frequencies: Floats, traditional: bool
) -> Array:
    """Of heads (B, H, T, D), by angles that are float32 products."""
    dims, x = 2 * frequencies.size, x.astype(np.float64)
    where = (positions[:, None] + np.arange(x.shape[2])).astype(np.float32) * np.float32(0.5)
    angles = (where[:, None, :, None] * frequencies).astype(np.float64)
    first = slice(0, dims, 2) if traditional else slice(0, dims // 2)
    second = slice(1, dims, 2) if traditional else slice(dims // 2, dims)
    out = x.copy()
    out[..., first] = x[..., first] * np.cos(angles) - x[..., second] * np.sin(angles)
    out[..., second] = x[..., first] * np.sin(angles) + x[..., second] * np.cos(angles)
    return out


@pytest.mark.parametrize("traditional", [False, True], ids=["halves", "neighbors"])
@pytest.mark.parametrize("norm_at", [0, 1, 2], ids=["plain", "norm first", "norm last"])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 64, 64),
        (2, 5, 80, 32),
        (3, 1, 128, 128),
        (1, 40, 20, 20),
        (2, 3, 64, 0),
        (1, 2, 13, 6),
    ],
    ids=str,
)
def test_heads(
    core: native_kernels.Core,
    normal: Callable[..., Floats],
    shape: tuple[int, int, int, int],
    norm_at: int,
    traditional: bool,
) -> None:
    batch, tokens, dim, dims = shape
    counts, weight = [7, 2], normal(dim)
    inputs = [normal(batch, tokens, count * dim + 5)[..., : count * dim] for count in counts]
    frequencies = np.power(10000.0, -np.arange(dims // 2) / 32).astype(np.float32)
    for first in (0, 1000, 1_000_000):
        positions = first + 7 * np.arange(batch, dtype=np.int32)
        found = heads(
            core, inputs, counts, positions, frequencies,
            norm_at=norm_at, weight=weight, traditional=traditional,
        )  # fmt: skip
        for x, count, out in zip(inputs, counts, found, strict=True):
            exact: Array = x.reshape(batch, tokens, count, dim).swapaxes(1, 2)
            if norm_at == 1:
                exact = exact_norm(exact, weight, 1e-6)
            exact = exact_rotation(exact, positions, frequencies, traditional)
            if norm_at == 2:
                exact = exact_norm(exact, weight, 1e-6)
            close(out, exact)


def test_rotation_is_mlxs(core: native_kernels.Core, normal: Callable[..., Floats]) -> None:
    periods = (100.0 ** np.linspace(0, 2, 16)).astype(np.float32)
    x, positions = normal(3, 4, 5 * 48), np.array([0, 70, 100_000], np.int32)
    for traditional in (False, True):
        found = heads(core, [x], [5], positions, 1 / periods, traditional=traditional)
        shown = mx.array(x).reshape(3, 4, 5, 48).swapaxes(1, 2)
        mlxs = mx.fast.rope(
            shown, 32, traditional=traditional, base=None, scale=0.5,
            offset=mx.array(positions), freqs=mx.array(periods),
        )  # fmt: skip
        close(found[0], np.array(mlxs))


# ---- gates and softmax --------------------------------------------------------------------------


def gated(core: native_kernels.Core, gate: int, a: Floats, b: Floats) -> Floats:
    out = np.full(a.shape, 7, np.float32)
    core.gated(ctypes.byref(Gated(gate, a.size, address(a), address(b), address(out))))
    return out


@pytest.mark.parametrize("name", ["silu", "gelu_tanh", "clamped_swiglu"])
def test_gates(core: native_kernels.Core, normal: Callable[..., Floats], name: str) -> None:
    odd = [np.nan, np.inf, -np.inf, 0, -0.0, 100, -100, 89, -88.9, 1e30, -1e30, 1e-30, 7, 10, -10]
    a = np.concatenate([np.array(odd, np.float32), normal(70001) * 4])
    b = np.concatenate([np.ones(len(odd), np.float32), normal(70001) * 5])
    found = gated(core, native_kernels.GATES[name], a, b)
    with np.errstate(invalid="ignore"):
        close(found, np.array(GATES[name].function(mx.array(a), mx.array(b))))


def test_gelu_has_ggmls_table(core: native_kernels.Core) -> None:
    """All numbers of half precision give the same bits."""
    halves = np.arange(1 << 16).astype(np.uint16).view(np.float16).astype(np.float32)
    found = gated(core, native_kernels.GATES["gelu_tanh"], halves, np.ones_like(halves))
    np.testing.assert_array_equal(found, np.array(gelu_tanh(mx.array(halves))))


@pytest.mark.parametrize("gate", native_kernels.GATES.values(), ids=native_kernels.GATES)
def test_products_have_the_same_gates(normal: Callable[..., Floats], gate: int) -> None:
    isa = native_kernels.processor()[0]
    native_kernels.add(isa, "F32")
    x, weights = normal(3, 64), [normal(100, 64).view(np.uint8) for _ in range(2)]
    pair = [native_kernels.matrix(w, GGMLType.F32) for w in weights]
    a, b = native_kernels.product(isa, pair, x, 2)
    found = native_kernels.product(isa, pair, x, 2, gate=gate)[0]
    np.testing.assert_array_equal(found, gated(native_kernels.core(isa), gate, a, b))


def softmax(core: native_kernels.Core, x: Floats) -> Floats:
    out = np.full(x.shape, 7, np.float32)
    core.softmax(ctypes.byref(Softmax(address(x), *x.shape, address(out))))
    return out


@pytest.mark.parametrize("columns", [1, 5, 64, 1000, 128_256])
def test_softmax(core: native_kernels.Core, normal: Callable[..., Floats], columns: int) -> None:
    x = normal(3, columns) * 4
    powers = np.exp(x.astype(np.float64) - x.max(axis=-1, keepdims=True))
    close(softmax(core, x), powers / powers.sum(axis=-1, keepdims=True))


def test_softmax_of_what_is_no_number(
    core: native_kernels.Core, normal: Callable[..., Floats]
) -> None:
    x = normal(4, 37)
    x[0, 3], x[1, 36], x[2], x[3, :5] = np.nan, np.inf, -np.inf, -np.inf
    close(softmax(core, x), np.array(mx.softmax(mx.array(x), axis=-1)))


# ---- other builds -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Floats]:
    folder = tmp_path_factory.mktemp("steps")

    def run(name: str, compiler: str, *flags: str, emulator: tuple[str, ...] = ()) -> Floats:
        program, output = folder / name, folder / f"{name}.out"
        sources = [Path(__file__).with_name("steps.cpp"), native_kernels.SOURCES / "step.cpp"]
        command = [compiler, "-std=c++17", "-Wno-psabi", "-pthread", *flags, *map(str, sources)]
        subprocess.run([*command, "-o", str(program)], check=True)
        subprocess.run([*emulator, str(program), str(output)], check=True)
        return np.fromfile(output, np.float32)

    return run


@pytest.fixture(scope="module")
def portable(steps: Callable[..., Floats]) -> Floats:
    return steps("portable", "g++", "-O2")


def test_sanitizers_find_nothing(steps: Callable[..., Floats], portable: Floats) -> None:
    isa = native_kernels.processor()[0]
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1"]
    close(steps("sanitized", "g++", *checks, *native_kernels.FLAGS[isa]), portable, 2e-6)


@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")),
    reason="needs a compiler for ARM and an emulator",
)
def test_arm(steps: Callable[..., Floats], portable: Floats) -> None:
    flags = ["-O2", "-static", "-march=armv8.2-a+dotprod"]
    arm = steps("arm", "aarch64-linux-gnu-g++", *flags, emulator=("qemu-aarch64",))
    close(arm, portable, 2e-6)
