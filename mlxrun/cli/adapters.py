"""The option that names LoRA adapters, for the commands that apply or merge them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlxrun.cli.sections import option_in

Adapters = list[tuple[str, float]]


def adapter_option(verb: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """``--adapter PATH[:SCALE]``, any number of times; ``verb`` says what happens to them."""
    return option_in("Loading")(
        "--adapter",
        multiple=True,
        callback=strengths,
        metavar="PATH[:SCALE]",
        help=f"{verb} a LoRA adapter, at SCALE times its strength: a directory of mlx-lm's or "
        "PEFT's, or a GGUF of llama.cpp's. Several add up.",
    )


def strengths(context: object, parameter: object, values: tuple[str, ...]) -> Adapters:
    """Paths with their strengths; a path may have colons of its own."""
    return [_strength(value) for value in values]


def _strength(value: str) -> tuple[str, float]:
    path, _, scale = value.rpartition(":")
    try:
        return (path, float(scale)) if path and not Path(value).exists() else (value, 1.0)
    except (ValueError, OSError):  # no number; no path that the system would look at
        return value, 1.0
