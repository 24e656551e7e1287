"""Operations over blocks in MLX's graph: eager, recorded, on threads; whatever the inputs are."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from converters.gguf.types import GGMLType
from mlxrun.kernels import dispatch as kernels
from mlxrun.kernels.dispatch import HeadsSpec, Kernels, Matrix

Floats = npt.NDArray[np.float64]

ROWS, COLUMNS, EXPERTS = 40, 96, 5


@pytest.fixture(scope="module")
def k() -> Kernels:
    found = kernels.available({GGMLType.Q8_0, GGMLType.F32, GGMLType.F16})
    assert isinstance(found, Kernels), found
    return found


def blocks(seed: int, rows: int = ROWS, stack: int = 0) -> tuple[mx.array, Floats]:
    """A matrix in Q8_0, or a stack of them, and its numbers."""
    random = np.random.default_rng(seed)
    shape = (*((stack,) if stack else ()), rows, COLUMNS // 32)
    codes = random.integers(-128, 128, (*shape, 32), dtype=np.int8)
    scales = random.uniform(0.001, 0.01, (*shape, 1)).astype(np.float16)
    raw = np.concatenate([scales.view(np.uint8), codes.view(np.uint8)], axis=-1)
    numbers = codes.astype(np.float64) * scales
    return mx.array(raw.reshape(*shape[:-1], -1)), numbers.reshape(*shape[:-1], COLUMNS)


def matrix(seed: int, **options: Any) -> tuple[Matrix, Floats]:
    raw, numbers = blocks(seed, **options)
    return Matrix(raw, GGMLType.Q8_0, COLUMNS), numbers


def close(found: mx.array, expected: Floats, bound: float = 1e-5) -> None:
    assert found.shape == expected.shape
    difference = np.array(found.astype(mx.float32)) - expected
    assert np.abs(difference).max(initial=0) <= bound * max(np.abs(expected).max(initial=0), 1)


def normal(*shape: int) -> mx.array:
    x = mx.random.normal(shape)
    mx.eval(x)
    return x


def exact(x: mx.array) -> Floats:
    return np.array(x.astype(mx.float32)).astype(np.float64)


# ---- products ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (1,), (3, 4), (2, 1, 5), (0,)])
def test_products_of_several_matrices(k: Kernels, lead: tuple[int, ...]) -> None:
    (a, wa), (b, wb) = matrix(1), matrix(2, rows=7)
    x = normal(*lead, COLUMNS)
    first, second = k.product([a, b], 3)(x)
    close(first, exact(x) @ wa.T)
    close(second, exact(x) @ wb.T)


def test_order_bias_norm_and_residual(k: Kernels) -> None:
    order = np.random.default_rng(0).permutation(ROWS).astype(np.int32)
    raw, w = blocks(1)
    m = Matrix(raw, GGMLType.Q8_0, COLUMNS, mx.array(order))
    x, bias, weight, residual = normal(3, COLUMNS), normal(ROWS), normal(COLUMNS), normal(3, ROWS)
    product = k.product([m], 3, norm=(weight, 1e-5), biases=[bias], residual=True)
    normed = exact(x) / np.sqrt(np.square(exact(x)).mean(-1, keepdims=True) + 1e-5) * exact(weight)
    close(product(x, residual)[0], normed @ w[order].T + exact(bias) + exact(residual))


def test_a_norm_without_weight_and_a_gate(k: Kernels) -> None:
    (a, wa), (b, wb) = matrix(1), matrix(2)
    x = normal(3, COLUMNS)
    (found,) = k.product([a, b], 3, norm=(None, 1e-6), gate="silu")(x)
    normed = exact(x) / np.sqrt(np.square(exact(x)).mean(-1, keepdims=True) + 1e-6)
    gate = normed @ wa.T
    close(found, gate / (1 + np.exp(-gate)) * (normed @ wb.T))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_results_have_the_type_of_the_input(k: Kernels, dtype: mx.Dtype) -> None:
    m, w = matrix(1)
    x = normal(2, COLUMNS).astype(dtype)
    (found,) = k.product([m], 3)(x)
    assert found.dtype == dtype
    close(found, exact(x) @ w.T, {mx.float16: 1e-3, mx.bfloat16: 8e-3}.get(dtype, 1e-5))


STRIDED: dict[str, Callable[[mx.array], mx.array]] = {
    "transposed": lambda x: x.T,
    "every second": lambda x: mx.repeat(x.T, 2, axis=1)[:, ::2],
    "backwards": lambda x: x.T[::-1, ::-1],
    "broadcast": lambda x: mx.broadcast_to(x.T[:1], (3, COLUMNS)),
    "columns of more": lambda x: mx.pad(x.T, [(0, 0), (8, 8)])[:, 8:-8],
    "rows of more": lambda x: x.T[1:3],
    "axes exchanged": lambda x: mx.stack([x.T, x.T + 1], axis=1).swapaxes(0, 1),
}


@pytest.mark.parametrize("kind", STRIDED)
def test_inputs_that_do_not_lie_in_order(k: Kernels, kind: str) -> None:
    m, w = matrix(1)
    x = STRIDED[kind](normal(COLUMNS, 4))
    (found,) = k.product([m], 3, residual=True)(x, mx.zeros((*x.shape[:-1], ROWS)))
    close(found, exact(x) @ w.T)


def test_blocks_and_constants_that_do_not_lie_in_order(k: Kernels) -> None:
    raw, w = blocks(1)
    turned = Matrix(mx.contiguous(raw.T).T[::2], GGMLType.Q8_0, COLUMNS)
    x, bias = normal(2, COLUMNS), normal(ROWS)[::2].astype(mx.float16)
    (found,) = k.product([turned], 3, biases=[bias])(x)
    close(found, exact(x) @ w[::2].T + exact(bias))


# ---- the graph -----------------------------------------------------------------------------------


def nodes(name: str, *outputs: mx.array) -> int:
    """How many operations of a name a graph has."""
    graph = io.StringIO()
    mx.export_to_dot(graph, *outputs)
    return graph.getvalue().count(f'label ="{name}"')


def test_compiled_graphs_also_without_shapes(k: Kernels) -> None:
    (a, wa), (b, wb) = matrix(1), matrix(2)
    product = k.product([a, b], 3)

    def step(x: mx.array) -> mx.array:
        first, second = product(x * 2)
        return first - second

    for recorded in (mx.compile(step), mx.compile(step, shapeless=True)):
        for rows in (1, 3, 1, 8):
            x = normal(rows, COLUMNS)
            close(recorded(x), 2 * exact(x) @ (wa - wb).T)


def test_a_compiled_graph_has_an_operation_twice_only_if_it_is_another(k: Kernels) -> None:
    m, w = matrix(1)
    same, other = k.product([m], 3), k.product([m], 1)
    x = normal(2, COLUMNS)
    recorded = mx.compile(lambda x: [same(x)[0] + same(x)[0], other(x)[0]])
    assert nodes("BlockProduct", *recorded(x)) == 2
    close(recorded(x)[0], 2 * exact(x) @ w.T)


def test_masks_of_attention_are_not_confused_in_a_compiled_graph(k: Kernels) -> None:
    attend, q = k.attention(0.5), normal(1, 2, 4, 8)
    recorded = mx.compile(lambda q: [attend(q, q, q, None), attend(q, q, q, "causal")])
    plain, causal = recorded(q)
    close(plain, exact(mx.fast.scaled_dot_product_attention(q, q, q, scale=0.5)))
    close(causal, exact(mx.fast.scaled_dot_product_attention(q, q, q, scale=0.5, mask="causal")))


def test_threads_with_streams_of_their_own(k: Kernels) -> None:
    m, w = matrix(1)
    product, problems = k.product([m], 3), []
    inputs = [normal(rows, COLUMNS) for rows in (1, 2, 33)]

    def work(x: mx.array) -> None:
        try:
            for _ in range(30):
                with mx.stream(mx.new_stream(mx.cpu)):
                    (y,) = product(x + 0)
                    mx.async_eval(y)
                close(y, exact(x) @ w.T)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(x,)) for x in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


def test_inputs_without_other_references(k: Kernels) -> None:
    m, w = matrix(1, rows=COLUMNS)
    product, x = k.product([m], 3), normal(2, COLUMNS)
    y = x
    for _ in range(4):
        y = product(y * 1)[0] * 0.1
    expected = exact(x)
    for _ in range(4):
        expected = expected @ w.T * 0.1
    close(y, expected, 1e-4)


def test_weights_live_as_long_as_what_is_not_computed_yet(k: Kernels) -> None:
    m, w = matrix(1)
    x = normal(2, COLUMNS)
    (y,) = k.product([m], 3)(x)
    del m
    mx.clear_cache()
    close(y, exact(x) @ w.T)


# ---- experts and rows ----------------------------------------------------------------------------


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("lead", [(6,), (2, 3), (1, 1)])
def test_products_with_experts(k: Kernels, each: bool, lead: tuple[int, ...]) -> None:
    (a, wa), (b, wb) = matrix(1, stack=EXPERTS), matrix(2, stack=EXPERTS, rows=9)
    chosen = mx.random.randint(0, EXPERTS, (*lead, 3))
    x, bias = normal(*lead, 3 if each else 1, 1, COLUMNS), normal(EXPERTS, ROWS)
    first, second = k.experts([a, b], 3, biases=[bias, None])(x, chosen)
    index = np.array(chosen)
    close(first, exact(x) @ wa[index].swapaxes(-1, -2) + exact(bias)[index][..., None, :])
    close(second, exact(x) @ wb[index].swapaxes(-1, -2))


def test_a_gate_of_experts(k: Kernels) -> None:
    (a, wa), (b, wb) = matrix(1, stack=EXPERTS), matrix(2, stack=EXPERTS)
    chosen, x = mx.array([[0, 4], [3, 3]]), normal(2, 1, 1, COLUMNS)
    (found,) = k.experts([a, b], 3, gate="silu")(x, chosen)
    index = np.array(chosen)
    gate = exact(x) @ wa[index].swapaxes(-1, -2)
    close(found, gate / (1 + np.exp(-gate)) * (exact(x) @ wb[index].swapaxes(-1, -2)))


@pytest.mark.parametrize("dtype", [mx.int32, mx.uint32, mx.int64, mx.uint8])
def test_rows_by_index(k: Kernels, dtype: mx.Dtype) -> None:
    m, w = matrix(1)
    ids = mx.random.randint(0, ROWS, (5, 3)).astype(dtype)
    found = k.take(m)(ids.T)
    assert found.dtype == mx.float32
    assert np.array_equal(np.array(found), w[np.array(ids.T)].astype(np.float32))


def test_rows_that_do_not_exist_are_no_numbers(k: Kernels) -> None:
    m, w = matrix(1)
    found = np.array(k.take(m)(mx.array([3, ROWS, -1, 2**31 - 1, 0])))
    assert np.array_equal(found[[0, 4]], w[[3, 0]].astype(np.float32))
    assert np.isnan(found[1:4]).all()


def test_dequantized_matrices_and_stacks_in_their_order(k: Kernels) -> None:
    order = np.random.default_rng(0).permutation(ROWS).astype(np.int32)
    (raw, w), (stack, ws) = blocks(1), blocks(2, stack=EXPERTS)
    kind = GGMLType.Q8_0
    for given, numbers in ((raw, w), (stack, ws)):
        plain = k.dequantize(Matrix(given, kind, COLUMNS))
        turned = k.dequantize(Matrix(given, kind, COLUMNS, mx.array(order)))
        assert np.array_equal(np.array(plain), numbers.astype(np.float32))
        assert np.array_equal(np.array(turned), numbers[..., order, :].astype(np.float32))


# ---- the operations of a step --------------------------------------------------------------------


def test_rms_norm_and_a_sum(k: Kernels) -> None:
    x, weight, residual = normal(2, 3, 40), normal(40), normal(2, 3, 40)
    expected = exact(mx.fast.rms_norm(x, weight, 1e-5))
    close(k.rms_norm(weight, 1e-5)(x), expected)
    close(k.rms_norm(weight, 1e-5)(x, residual), expected + exact(residual))
    close(k.rms_norm(None, 1e-5)(x), exact(mx.fast.rms_norm(x, None, 1e-5)))


ROTATED = 16


def rotated(x: mx.array, positions: int | mx.array, traditional: bool) -> mx.array:
    return mx.fast.rope(x, ROTATED, traditional=traditional, base=1e4, scale=0.5, offset=positions)


@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("positions", [7, [3, 11]])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_heads(k: Kernels, tokens: int, positions: Any, traditional: bool) -> None:
    frequencies = mx.array([1e4 ** (-i / 8) for i in range(ROTATED // 2)])
    turn: dict[str, Any] = {
        "frequencies": frequencies, "scale": 0.5, "traditional": traditional
    }  # fmt: skip
    weight, lead = normal(24), (2, tokens) if tokens else (2,)
    specs = [
        HeadsSpec(4, 24, "before", weight, 1e-5, **turn),
        HeadsSpec(2, 24, "after", None, 1e-5, **turn),
        HeadsSpec(2, 24),
    ]
    # As a fused projection has them: parts of one array.
    q, key, v = mx.split(normal(*lead, 8 * 24), [4 * 24, 6 * 24], axis=-1)
    at = mx.array(positions) if isinstance(positions, list) else positions
    found = k.heads(specs)([q, key, v], at)
    plain = [
        x.reshape(2, tokens or 1, heads, 24).swapaxes(1, 2)
        for x, heads in ((q, 4), (key, 2), (v, 2))
    ]
    normed = mx.fast.rms_norm(plain[0], weight, 1e-5)
    close(found[0], exact(rotated(normed, at, traditional)), 1e-5)
    turned = rotated(plain[1], at, traditional)
    close(found[1], exact(mx.fast.rms_norm(turned, None, 1e-5)), 1e-5)
    close(found[2], exact(plain[2]), 0)


MASKS: dict[str, tuple[int, ...]] = {
    "all": (2, 1, 5, 9),
    "shared": (5, 9),
    "of rows": (2, 1, 1, 9),
    "one axis": (9,),
}


@pytest.mark.parametrize("mask", [None, "causal", *MASKS])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_attention(k: Kernels, mask: str | None, dtype: mx.Dtype) -> None:
    # Queries as heads of a projection, keys and values as parts of a longer cache.
    q = normal(2, 5, 4, 16).swapaxes(1, 2).astype(dtype)
    keys, values = (normal(2, 2, 20, 16)[:, :, 3:12].astype(dtype) for _ in range(2))
    given: Any = mask
    if mask in MASKS:
        given = mx.random.bernoulli(0.6, MASKS[mask]) | (mx.arange(9) == 0)
    found = k.attention(0.25)(q, keys, values, given)
    expected = mx.fast.scaled_dot_product_attention(
        *(x.astype(mx.float32) for x in (q, keys, values)), scale=0.25, mask=given
    )
    assert found.dtype == dtype
    close(found, exact(expected), 1e-5 if dtype == mx.float32 else 1e-3)


def test_attention_with_softcap_sinks_and_slopes(k: Kernels) -> None:
    q, keys, values = normal(1, 4, 3, 8), normal(1, 2, 7, 8), normal(1, 2, 7, 6)
    sinks, slopes = normal(4), mx.array([0.5, 0.25, 0.125, 0.0625])
    found = k.attention(0.3, 5.0, sinks, slopes)(q, keys, values, "causal")
    repeated = [np.repeat(exact(x), 2, axis=1) for x in (keys, values)]
    scores = 0.3 * exact(q) @ repeated[0].swapaxes(-1, -2)
    distance = np.arange(7)[None, :] - (np.arange(3)[:, None] + 4)
    scores = 5 * np.tanh(scores / 5) + exact(slopes)[:, None, None] * distance
    scores = np.where(distance > 0, -np.inf, scores)
    weights = np.exp(scores)
    weights /= weights.sum(-1, keepdims=True) + np.exp(exact(sinks))[:, None, None]
    close(found, weights @ repeated[1])


def test_attention_s_result_lies_by_token(k: Kernels) -> None:
    q = normal(2, 4, 3, 8)
    found = k.attention(1.0)(q, q, q, None)
    mx.eval(found)
    seen = np.array(found, copy=False)
    assert seen.swapaxes(1, 2).flags.c_contiguous
    close(found.swapaxes(1, 2).reshape(2, 3, 32), seen.swapaxes(1, 2).reshape(2, 3, 32))


def test_gates_and_softmax(k: Kernels) -> None:
    # As a fused projection has them: halves of one array.
    a, b = mx.split(normal(3, 2, 64), 2, axis=-1)
    close(k.gated("silu")(a, b), exact(a * mx.sigmoid(a) * b))
    low, high = mx.minimum(a, 7), mx.clip(b, -7, 7)
    close(k.gated("clamped_swiglu")(a, b), exact(low * mx.sigmoid(1.702 * low) * (high + 1)))
    half = exact(a)
    tanh = 0.5 * half * (1 + np.tanh(0.7978845608 * half * (1 + 0.044715 * half**2)))
    close(k.gated("gelu_tanh")(a, b), tanh * exact(b), 2e-3)  # ggml's is by a table of halves
    close(k.softmax(a), exact(mx.softmax(a, axis=-1)))


# ---- what is refused -----------------------------------------------------------------------------

WRONG: dict[str, tuple[type[Exception], Callable[[Kernels, Matrix, mx.array], object]]] = {
    "columns": (ValueError, lambda k, m, x: k.product([m])(x[..., :-1])),
    "no axis": (ValueError, lambda k, m, x: k.product([m])(mx.array(1.0))),
    "integers": (ValueError, lambda k, m, x: k.product([m])(x.astype(mx.int32))),
    "doubles": (ValueError, lambda k, m, x: k.product([m])(x.astype(mx.float64))),
    "an array of NumPy's": (TypeError, lambda k, m, x: k.product([m])(np.array(x))),
    "nothing": (TypeError, lambda k, m, x: k.product([m])(None)),
    "a residual too many": (ValueError, lambda k, m, x: k.product([m])(x, x)),
    "no residual": (ValueError, lambda k, m, x: k.product([m], residual=True)(x)),
    "residual": (ValueError, lambda k, m, x: k.product([m], residual=True)(x, x)),
    "planes": (ValueError, lambda k, m, x: k.product([m], 4)),
    "bias": (ValueError, lambda k, m, x: k.product([m], biases=[x[0]])),
    "norm": (ValueError, lambda k, m, x: k.product([m], norm=(x[0, :-1], 1e-5))),
    "order": (ValueError, lambda k, m, x: Matrix(m.blocks, m.type, COLUMNS, mx.arange(3))),
    "blocks": (ValueError, lambda k, m, x: Matrix(m.blocks, m.type, COLUMNS + 32)),
    "one side of a gate": (ValueError, lambda k, m, x: k.product([m], gate="silu")),
    "a gate of other names": (KeyError, lambda k, m, x: k.gated("relu")),
    "a type that is never loaded": (
        ValueError,
        lambda k, m, x: k.product([Matrix(m.blocks[:, :36], GGMLType.Q8_1, 32)]),
    ),
    "floats as indices": (ValueError, lambda k, m, x: k.take(m)(x)),
    "experts of a matrix": (ValueError, lambda k, m, x: k.experts([m])),
    "sides of a gate": (ValueError, lambda k, m, x: k.gated("silu")(x, x[:, :3])),
    "heads": (ValueError, lambda k, m, x: k.heads([HeadsSpec(5, 16)])([x], 0)),
    "frequencies": (
        ValueError, lambda k, m, x: k.heads([HeadsSpec(6, 16, frequencies=mx.ones(9))])([x], 0)
    ),
    "positions": (
        ValueError, lambda k, m, x: k.heads([HeadsSpec(6, 16)])([x], mx.array([1, 2, 3]))
    ),
    "mask": (
        ValueError, lambda k, m, x: k.attention(1.0)(*[x[None, None]] * 3, mx.ones((2, 3)) > 0)
    ),
    "additive mask": (
        ValueError, lambda k, m, x: k.attention(1.0)(*[x[None, None]] * 3, mx.zeros((2, 2)))
    ),
    "sinks": (
        ValueError,
        lambda k, m, x: k.attention(1.0, sinks=mx.ones(3))(*[x[None, None]] * 3, None),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_refused_when_the_graph_is_built(k: Kernels, what: str) -> None:
    error, build = WRONG[what]
    m, _ = matrix(1)
    with pytest.raises(error):
        build(k, m, normal(2, COLUMNS))
