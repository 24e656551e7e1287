"""From the names of original Hugging Face repositories to those that mlxrun and mlx-lm share.

One place for loading and for converting. Arrays become views and stacks that MLX computes when they
are used; no weight is read here. For our own families only: mlx-lm's classes rename theirs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from converters.directory.encode import dequantised
from converters.directory.spellings import (
    EXPERT_PARTS,
    MULTIMODAL,
    NEEDLESS,
    OTHER_TOWERS,
    TEXT_MODELS,
    Spelling,
    spelling_of,
)
from converters.directory.stored import decode
from converters.directory.weights import Origin, Weights
from converters.errors import CheckpointError
from converters.quantize.layout import Layout
from converters.quantize.recipe import EIGHT_BITS

HFConfig = dict[str, Any]


def normalise(config: HFConfig, weights: Weights, *, stock: bool = False) -> None:
    """Rename and reshape the weights of one of our families in place.

    Args:
        config: of the text model; see :func:`text_config`.
        stock: stop where mlx-lm's class of the family stops.

    Raises:
        CheckpointError: arrays are missing or have shapes that contradict ``config.json``.
    """
    spelling = spelling_of(config)
    try:
        _prefixes(weights)
        _leave_out(config, weights, spelling)
        decode(config, weights)
        if spelling.experts:
            _aliases(weights, spelling)
            _stack_experts(weights, spelling.experts)
            _part_experts(config, weights, spelling)
        if spelling.latent == "always" or (spelling.latent and not stock):
            _part_latent(config, weights)
    except (KeyError, TypeError, ValueError) as error:
        # MLX refuses shapes with ValueError; a key is one of the config's or of the weights'.
        raise CheckpointError(f"config.json and the weights do not agree: {error}") from error


def text_config(config: HFConfig) -> HFConfig:
    """The configuration of the text model in that of a model of text and images."""
    inner = config.get("text_config")
    kind = str(config.get("model_type"))
    if kind not in TEXT_MODELS or not isinstance(inner, dict):
        return config
    shared = {key: config[key] for key in _SHARED if key in config}
    text = {**MULTIMODAL[kind], **shared, **inner}
    return text if text["model_type"] in TEXT_MODELS[kind] else config


_SHARED = (
    "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype", "quantization",
    "quantization_config", "tie_word_embeddings",
)  # fmt: skip


def form_of(config: HFConfig) -> Callable[[str, Layout], Layout | None]:
    """What a module of one of our families takes where a form is asked for; None: only floats."""
    spelling = spelling_of(config)

    def form(module: str, asked: Layout) -> Layout | None:
        if module.endswith(spelling.plain):
            return None
        low = module.endswith(spelling.routers) and asked.bits < EIGHT_BITS.bits
        lost = module.endswith(spelling.sensitive) and asked.mode != "affine"
        return EIGHT_BITS if low or lost else asked

    return form


def stays(config: HFConfig, name: str) -> bool:
    """Whether a parameter of one of our families keeps its own type of floats."""
    return name.endswith(spelling_of(config).precise)


def _prefixes(weights: Weights) -> None:
    """The text model's own names, where it is a part of a larger model."""
    for name in list(weights.arrays):
        for begin, end in (
            ("language_model.", ""),
            ("model.language_model.", "model."),
            ("model.vision_tower.", "vision_tower."),
            ("model.multi_modal_projector.", "multi_modal_projector."),
        ):
            if name.startswith(begin):
                weights.move(name, end + name.removeprefix(begin))
                break


_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def _leave_out(config: HFConfig, weights: Weights, spelling: Spelling) -> None:
    """Parameters that the text model does not have, each with the reason."""
    layers = int(config.get("num_hidden_layers", 0))
    tied = bool(config.get("tie_word_embeddings", spelling.tied))
    for name in list(weights.arrays):
        layer = _LAYER.match(name)
        reason = next((why for begin, why in OTHER_TOWERS.items() if name.startswith(begin)), None)
        reason = reason or next((why for end, why in NEEDLESS.items() if name.endswith(end)), None)
        if tied and name.startswith("lm_head."):
            reason = "the embedding serves as the head"
        elif layer and int(layer[1]) >= layers:
            reason = f"beyond the {layers} layers of config.json (not used for generation)"
        if reason:
            weights.skip(name, reason)


def _aliases(weights: Weights, spelling: Spelling) -> None:
    for name in list(weights.arrays):
        layer = _LAYER.match(name)
        for begin, ours in spelling.aliases.items() if layer else ():
            assert layer
            rest = name[layer.end() :]
            if rest.startswith(begin):
                weights.move(name, layer[0] + ours + rest.removeprefix(begin))


_EXPERT = re.compile(
    r"(model\.layers\.\d+\.).+\.experts\.(\d+)\.(\w+)\.(weight|scales|biases|bias)"
)


def _stack_experts(weights: Weights, home: str) -> None:
    """Experts stored one by one, ``experts.N.w1``, as one stack."""
    stacks: dict[str, dict[int, str]] = {}
    for name in weights.arrays:
        found = _EXPERT.fullmatch(name)
        if found and found[3] in EXPERT_PARTS:
            target = f"{found[1]}{home}.{EXPERT_PARTS[found[3]]}.{found[4]}"
            stacks.setdefault(target, {})[int(found[2])] = name
    for target, members in stacks.items():
        names = [members.get(number) for number in range(len(members))]
        first = members[min(members)]
        missing = names.index(None) if None in names else None
        if missing is not None:
            raise CheckpointError(
                f"expert {missing} of {first.split('.experts.')[0]} is not among the weights",
                hint="Download it again",
            )
        weights.stack([str(name) for name in names], target)


_FUSED = re.compile(
    r"(model\.layers\.\d+\.)(?:.+\.)?(?:experts\.gate_up_proj|(input_linear))(_bias|\.bias|\.\w+)?"
)
_DOWN = re.compile(
    r"(model\.layers\.\d+\.)(?:.+\.)?(?:experts\.down_proj|output_linear)(_bias|\.bias|\.\w+)?"
)
_SUFFIXES = {None: "weight", "_bias": "bias"}


def _part_experts(config: HFConfig, weights: Weights, spelling: Spelling) -> None:
    """Gate and up projections of all experts in one array, as two; one orientation for all."""
    width = int(config.get("moe_intermediate_size") or config["intermediate_size"])
    hidden = int(config["hidden_size"])
    turned: dict[str, bool] = {}
    for name in list(weights.arrays):
        if found := _FUSED.fullmatch(name):
            layer, kind = found[1], _suffix(found[3])
            array = weights.arrays[name]
            if kind == "weight" and name.rpartition(".")[0] not in weights.layouts:
                turned[layer] = _turned(array.shape, (2 * width, hidden), spelling.interleaved)
                array = array.swapaxes(-1, -2) if turned[layer] else array
            axis = 1
            halves = (
                (array[:, ::2], array[:, 1::2])
                if spelling.interleaved
                else mx.split(array, 2, axis=axis)
            )
            targets = [
                f"{layer}{spelling.experts}.{part}.{kind}" for part in ("gate_proj", "up_proj")
            ]
            weights.part(name, dict(zip(targets, halves, strict=True)))
    for name in list(weights.arrays):
        if found := _DOWN.fullmatch(name):
            layer, kind = found[1], _suffix(found[2])
            array = weights.arrays[name]
            if kind == "weight" and turned.get(layer):
                array = array.swapaxes(-1, -2)
            weights.part(name, {f"{layer}{spelling.experts}.down_proj.{kind}": array})


def _suffix(text: str | None) -> str:
    return _SUFFIXES.get(text) or str(text).removeprefix(".")


def _turned(shape: tuple[int, ...], rows: tuple[int, int], first: bool) -> bool:
    """Whether matrices are stored as (columns, rows): they were multiplied from the left.

    Args:
        rows: the wanted shape.
        first: what to believe where both fit.
    """
    fits, fits_turned = shape[-2:] == rows, shape[-2:] == rows[::-1]
    return fits_turned and (first or not fits)


def _part_latent(config: HFConfig, weights: Weights) -> None:
    """The keys' and the values' way out of the latent space, a matrix per head (DeepSeek V2)."""
    heads, width = int(config["num_attention_heads"]), int(config["qk_nope_head_dim"])
    for name in [name for name in weights.arrays if name.endswith(".kv_b_proj.weight")]:
        module = name.removesuffix(".weight")
        base = module.removesuffix(".kv_b_proj")
        layout = weights.layouts.pop(module, None)
        array = weights.arrays[name]
        if layout is not None:
            kinds = ("scales", "biases") if layout.mode == "affine" else ("scales",)
            parts = [weights.arrays.pop(f"{module}.{kind}") for kind in kinds]
            array = dequantised([array, *parts], layout)
            weights.origins[name] = Origin(name, str(layout), layout.bits_per_weight)
        each = array.reshape(heads, -1, array.shape[-1])  # (H, width + values, latent)
        targets = {
            f"{base}.embed_q.weight": each[:, :width].swapaxes(-1, -2),
            f"{base}.unembed_out.weight": each[:, width:],
        }
        weights.part(name, targets)
