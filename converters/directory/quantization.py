"""What ``config.json`` says of how modules are quantised, read as mlx-lm reads it.

Loader, memory plan and reports ask here, so that they agree. Knows nothing of the arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.errors import CheckpointError
from converters.quantize.layout import (
    BITS,
    DEFAULT_GROUP,
    FIXED_MODES,
    GROUPS,
    Layout,
    affine,
    fixed,
)

# Bits of affine codes where a module's own entry does not say.
_DEFAULT_BITS = 4


def stored_form(config: Mapping[str, Any], module: str) -> Layout:
    """The form of a module that has scales.

    An entry of its own stands for itself: what it leaves out is its mode's default, whatever the
    section says of all others (``mlx_lm.utils.load_model`` hands it to ``to_quantized`` as it is).

    Raises:
        CheckpointError: there is no such section, or it names a form that MLX does not have.
    """
    section = config.get("quantization") or config.get("quantization_config")
    if not section or not isinstance(section, dict):
        raise CheckpointError("the weights are quantised but config.json does not say how")
    own = section.get(module)
    how = own if isinstance(own, dict) else section
    mode = str(how.get("mode", "affine"))
    if mode in FIXED_MODES:
        return fixed(mode)
    if mode != "affine":
        raise CheckpointError(f"config.json: quantization mode {mode!r} is not known")
    bits, group = how.get("bits"), how.get("group_size")
    if how is own:
        bits, group = bits or _DEFAULT_BITS, group or DEFAULT_GROUP
    if type(bits) is not int or bits not in BITS or type(group) is not int or group not in GROUPS:
        raise CheckpointError(
            f"config.json: quantization of {bits!r} bits in groups of {group!r} is none of MLX's"
        )
    return affine(bits, group)
