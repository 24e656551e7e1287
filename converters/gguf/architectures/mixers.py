"""Mamba mixers: what GGUF calls their tensors, how it stores them, and their sizes."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from converters.gguf.architectures.row import Shape, depthwise, log_of_negative, renamed, without
from converters.gguf.numbers import layer_count, scalar
from converters.gguf.reader import GGUFFile

#: A Mamba 2 mixer.
MIXER = {
    "ssm_in": "mixer.in_proj",
    "ssm_conv1d": "mixer.conv1d",
    "ssm_dt.bias": "mixer.dt_bias",
    "ssm_a": "mixer.A_log",
    "ssm_d": "mixer.D",
    "ssm_norm": "mixer.norm",
    "ssm_out": "mixer.out_proj",
}
#: A Mamba mixer.
FIRST_MIXER = {
    **without(MIXER, "ssm_norm"),
    "ssm_x": "mixer.x_proj",
    "ssm_dt": "mixer.dt_proj",
    "ssm_dt.bias": "mixer.dt_proj.bias",
}
#: The same under the name that hybrids give them.
MAMBA = renamed(MIXER, "mixer.", "mamba.")
FIRST_MAMBA = renamed(FIRST_MIXER, "mixer.", "mamba.")

# No limit of steps: JSON has no infinity, and no step comes near this one.
UNLIMITED = [0.0, 1e30]


def flat(shape: Shape) -> Shape:
    """Everything in one axis: GGUF gives rates a second one, and norms one for groups."""
    return (prod(shape),)


FIRST_SHAPES = {"ssm_conv1d": depthwise}
SHAPES = {**FIRST_SHAPES, "ssm_a": flat, "ssm_d": flat, "ssm_norm": flat}
DECAY = {"ssm_a": log_of_negative}


@dataclass(frozen=True)
class Sizes:
    """Sizes of a Mamba 2 mixer: ``width`` is that of a head, ``kernel`` that of the convolution."""

    inner: int
    heads: int
    width: int
    groups: int
    state: int
    kernel: int


def sizes(gguf: GGUFFile, *, groups: bool = True) -> Sizes:
    """The sizes of a file's mixers.

    Args:
        groups: whether the model's class normalises each group by itself, as the authors' kernels
            and llama.cpp do; if not, one group is all that it can run.

    Raises:
        GGUFError: heads do not share the inner size, or groups the heads, equally; or there are
            more groups than the class can run.
    """
    inner, heads = scalar(gguf, "ssm.inner_size"), scalar(gguf, "ssm.time_step_rank")
    count = scalar(gguf, "ssm.group_count", 1)
    if heads < 1 or inner < 1 or inner % heads:
        key = f"{gguf.architecture}.ssm.time_step_rank"
        raise gguf.error(key, expected=f"a number of heads that divides {inner}")
    if count < 1 or heads % count:
        key = f"{gguf.architecture}.ssm.group_count"
        raise gguf.error(key, expected=f"a number of groups that divides {heads} heads")
    if count > 1 and not groups:
        key = f"{gguf.architecture}.ssm.group_count"
        raise gguf.error(key, expected="1, as the model class normalises all groups together")
    state, kernel = scalar(gguf, "ssm.state_size"), scalar(gguf, "ssm.conv_kernel")
    return Sizes(inner, heads, inner // heads, count, state, kernel)


def in_any_layer(gguf: GGUFFile, tensor: str) -> bool:
    """Whether any layer has a tensor."""
    return any(f"blk.{i}.{tensor}" in gguf for i in range(layer_count(gguf)))
