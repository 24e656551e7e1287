"""Norms, activations and other small functions, chosen once when a model is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx

from mlxrun.kernels.cpu_ops import gelu_tanh, sigmoid, silu
from mlxrun.models.config import Norm
from mlxrun.weights.fused import Added, Gate, RMSNorm
from mlxrun.weights.linear import settled
from mlxrun.weights.parameters import Parameters

Function = Callable[[mx.array], mx.array]


def compose(*functions: Function | None) -> Function:
    """One function after the other, without those that are None."""
    present = [function for function in functions if function is not None]
    if not present:
        return lambda x: x
    if len(present) == 1:
        return present[0]

    def chain(x: mx.array) -> mx.array:
        for function in present:
            x = function(x)
        return x

    return chain


def scaled(factor: float) -> Function | None:
    """Multiplication; None where it would do nothing."""
    return None if factor == 1.0 else lambda x: x * factor


def softcapped(cap: float | None) -> Function | None:
    """``cap * tanh(x / cap)``; None without a cap."""
    return None if cap is None else lambda x: mx.tanh(x / cap) * cap


def clipped(bound: float | None) -> Function | None:
    """Values within ``bound`` of zero; None without a bound."""
    return None if bound is None else lambda x: mx.clip(x, -bound, bound)


def norm(config: Norm, params: Parameters, name: str, size: int, heads: int = 0) -> Function:
    """A norm over the last axis, of ``size``; of (B, heads, T, size) each head has its weights."""
    if heads:
        plain, each = norm(replace(config, bare=True), params, name, size), f"{name}.norms"
        if params.has(f"{each}.0.weight"):
            rows = [params.vector(f"{each}.{i}.weight", size) for i in range(heads)]
            stretch = mx.stack(rows)
        else:
            stretch = params.weight(name, heads, size).dequantize(params.dtype)
        stretch = settled(stretch[:, None])  # (heads, 1, size)
        return lambda x: plain(x) * stretch
    weight = None if config.bare else params.vector(f"{name}.weight", size)
    if config.offset and weight is not None:
        weight = settled((weight.astype(mx.float32) + config.offset).astype(weight.dtype))
    eps = config.eps
    if config.kind == "rms":
        kernels = params.kernels
        return RMSNorm(weight, eps, None if kernels is None else kernels.rms_norm(weight, eps))
    bias = params.vector(f"{name}.bias", size) if params.has(f"{name}.bias") else None
    return lambda x: mx.fast.layer_norm(x, weight, bias, eps)


def added(sublayer: Added, after: Function | None, factor: float) -> Added:
    """``(x, residual) -> residual + factor * after(sublayer(x))``, fused where that is possible."""
    if factor == 1.0 and after is None:
        return sublayer
    if factor == 1.0 and isinstance(after, RMSNorm):
        normed = after
        return lambda x, residual=None: normed(sublayer(x), residual)
    finish = compose(after, scaled(factor))

    def add(x: mx.array, residual: mx.array | None = None) -> mx.array:
        y = finish(sublayer(x))
        return y if residual is None else residual + y

    return add


def _gated(activation: Function) -> Callable[[mx.array, mx.array], mx.array]:
    return lambda gate, up: activation(gate) * up


def _clamped_swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """gpt-oss's SwiGLU: both sides bounded by 7, the linear one moved by one."""
    gate, up = mx.minimum(gate, 7.0), mx.clip(up, -7.0, 7.0)
    return gate * sigmoid(1.702 * gate) * (up + 1)


ACTIVATIONS: dict[str, Function] = {
    "silu": silu,
    "gelu_tanh": gelu_tanh,
    "gelu": lambda x: 0.5 * x * (1 + mx.erf(x * 0.7071067811865476)),
    "relu2": lambda x: mx.square(mx.maximum(x, 0)),
}
#: Gated activations.
GATES = {name: Gate(name, _gated(function)) for name, function in ACTIVATIONS.items()} | {
    "clamped_swiglu": Gate("clamped_swiglu", _clamped_swiglu)
}
