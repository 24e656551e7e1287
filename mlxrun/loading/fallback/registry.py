"""Which class of mlx-lm a ``config.json`` means.

Looks at the names of mlx-lm's files before anything of it is imported: a ``model_type`` comes from
a stranger's file and must not choose what is run beyond mlx-lm's own model classes.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from converters.gguf.checks import MAX_BLOCKS
from mlxrun.errors import CheckpointError, UnsupportedArchitectureError
from mlxrun.kernels.compilation import avoid_fusion

# Files beside the models that define none.
_TOOLS = {
    "activations", "base", "bitlinear_layers", "cache", "gated_delta", "mla", "pipeline",
    "rope_utils", "ssm", "switch_layers",
}  # fmt: skip

_HEADS = (
    "num_attention_heads", "num_key_value_heads", "num_global_key_value_heads", "head_dim",
    "global_head_dim",
)  # fmt: skip
_MANY = 1 << 20


@cache
def own_types() -> frozenset[str]:
    """Names of mlx-lm's model files; nothing is imported."""
    spec = importlib.util.find_spec("mlx_lm")
    if spec is None or spec.origin is None:
        return frozenset()
    files = Path(spec.origin).parent.joinpath("models").glob("*.py")
    return frozenset(file.stem for file in files) - _TOOLS - {"__init__"}


def classes(config: Mapping[str, Any]) -> tuple[Any, Any] | None:
    """mlx-lm's ``Model`` and ``ModelArgs`` for a config; None where it has none.

    Raises:
        UnsupportedArchitectureError: the directory wants code of its own to be run.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or not own_types():
        return None
    if config.get("model_file") is not None:
        raise UnsupportedArchitectureError(
            f"config.json asks to run {str(config['model_file'])[:80]!r} of the model directory",
            hint="Code that comes with weights is never run; use a model of a known model_type",
        )
    from mlx_lm import utils

    avoid_fusion()  # its models compile functions of theirs
    if kind not in own_types() and kind not in utils.MODEL_REMAPPING:
        return None
    try:
        model, args = utils._get_classes(dict(config))
    except (ValueError, AttributeError):
        return None
    return model, args


def unsupported(kind: object, ours: Iterable[str]) -> UnsupportedArchitectureError:
    """The error for a ``model_type`` that nobody defines, with the nearest one that is known.

    Args:
        ours: the families that this project defines.
    """
    known = sorted({*ours, *own_types()})
    near = difflib.get_close_matches(str(kind)[:80], known, n=1, cutoff=0.0)
    return UnsupportedArchitectureError(
        f"model_type {str(kind)[:80]!r} is not supported",
        hint=f"The nearest known one is {near[0]}" if near else None,
    )


def arguments(args: Any, config: Mapping[str, Any]) -> Any:
    """The ``ModelArgs`` of a config.

    Raises:
        CheckpointError: a key is missing or a value is one that the class does not take.
    """
    for section in (config, config.get("text_config")):
        if isinstance(section, Mapping):
            _check_counts(section)
    try:
        return args.from_dict(_untagged(dict(config)))
    except Exception as error:  # whatever a class raises on odd values
        raise CheckpointError(
            f"config.json does not describe a {str(config.get('model_type'))[:80]}: {error}"
        ) from error


def _check_counts(section: Mapping[str, Any]) -> None:
    """Refuse what would take for ever, or what MLX divides by or looks up unchecked, and dies."""
    most = {"num_hidden_layers": MAX_BLOCKS, **dict.fromkeys(_HEADS, _MANY)}
    for name, limit in most.items():
        value = section.get(name)
        if isinstance(value, int) and not 0 < value <= limit:
            raise CheckpointError(f"config.json has an impossible {name}: {value}")
    active, inputs = section.get("altup_active_idx", 0), section.get("altup_num_inputs", 4)
    if isinstance(active, int) and isinstance(inputs, int) and not 0 <= active < inputs:
        raise CheckpointError(f"config.json has an impossible altup_active_idx: {active}")


def _untagged(value: Any) -> Any:
    """Numbers that JSON cannot hold, which transformers writes as ``{"__float__": "Infinity"}``."""
    if isinstance(value, Mapping):
        tag = value.get("__float__") if len(value) == 1 else None
        if tag in ("Infinity", "-Infinity", "NaN"):
            return float(tag)
        return {key: _untagged(entry) for key, entry in value.items()}
    return [_untagged(entry) for entry in value] if isinstance(value, list) else value
