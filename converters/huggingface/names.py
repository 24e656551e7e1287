"""From the names of original Hugging Face repositories to those that mlxrun and mlx-lm share.

A family that differs has a row in ``SPELLINGS``. Arrays become lazy views and stacks; no weight is
read. For our own families only: mlx-lm's classes rename theirs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from converters.errors import CheckpointError
from converters.huggingface.weights import Origin, Weights, decode_prequantized, dequantized
from converters.quantize.layout import Layout
from converters.quantize.recipe import EIGHT_BITS


@dataclass(frozen=True)
class Spelling:
    """One family.

    Attributes:
        experts: the module of a layer that holds its stacked experts.
        aliases: other prefixes of a layer's modules, and ours.
        interleaved: whether fused gate and up projections alternate row by row.
        latent: whether ``kv_b_proj`` is parted into ``embed_q`` and ``unembed_out``; ``reading``
            where mlx-lm's class wants it whole, so that only mlxrun parts it.
        routers: modules that choose experts: 8 bits, whatever the rest gets.
        plain: modules that mlx-lm's class cannot hold quantized.
        precise: parameters that stay in their own type.
        sensitive: modules whose weights are so small that microscaling modes lose them: 8 bits
            there (mlx-lm keeps the same ones).
        tied: whether the embedding is the head where the config does not say.
    """

    experts: str | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    interleaved: bool = False
    latent: str | None = None
    routers: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    precise: tuple[str, ...] = ()
    sensitive: tuple[str, ...] = ()
    tied: bool = False


_TIED = Spelling(tied=True)
_SWITCH = "mlp.switch_mlp"
_SMALL = ("self_attn.o_proj", "mlp.down_proj", "lm_head")

# Families that are not here spell everything as mlxrun does.
SPELLINGS: dict[str, Spelling] = {
    "cohere": _TIED,
    "cohere2": _TIED,
    "deepseek": Spelling(_SWITCH, plain=("mlp.gate",)),
    "deepseek_v2": Spelling(_SWITCH, latent="reading", plain=("mlp.gate",)),
    "deepseek_v3": Spelling(
        _SWITCH, latent="always", plain=("mlp.gate",), precise=("e_score_correction_bias",)
    ),
    "dots1": Spelling("mlp.experts", plain=("mlp.gate",), precise=("e_score_correction_bias",)),
    "gemma": _TIED,
    "gemma2": _TIED,
    "gemma3_text": _TIED,
    "glm4_moe": Spelling(_SWITCH, plain=("mlp.gate",), precise=("e_score_correction_bias",)),
    "gpt_oss": Spelling("mlp.experts", interleaved=True, routers=("mlp.router",)),
    "granite": Spelling(sensitive=_SMALL),
    "granitemoe": Spelling(
        "block_sparse_moe.switch_mlp",
        routers=("block_sparse_moe.router.layer",),
        sensitive=_SMALL,
    ),
    "hunyuan_v1_moe": Spelling(_SWITCH, routers=("mlp.gate.wg",)),
    "mixtral": Spelling(
        "block_sparse_moe.switch_mlp",
        aliases={"mlp.": "block_sparse_moe."},
        routers=("block_sparse_moe.gate",),
    ),
    "olmoe": Spelling(_SWITCH, routers=("mlp.gate",)),
    "qwen2_moe": Spelling(_SWITCH, routers=("mlp.gate", "shared_expert_gate")),
    "qwen3_moe": Spelling(_SWITCH, routers=("mlp.gate",)),
}


def spelling_of(config: Mapping[str, Any]) -> Spelling:
    """The row of a family of ours."""
    return SPELLINGS.get(str(config.get("model_type")), Spelling())


# Models of text and images, by those of our families that their text model may be: what their
# text_config may leave out because transformers has it as a default (of Gemma3TextConfig; the
# others say everything).
TEXT_MODELS = {"gemma3": ("gemma3_text",), "mistral3": ("mistral", "ministral3", "llama")}
MULTIMODAL: dict[str, dict[str, Any]] = {
    "gemma3": {
        "model_type": "gemma3_text",
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "max_position_embeddings": 131072,
    },
    "mistral3": {"model_type": "mistral"},
}

# Projections of experts that are stored one by one.
EXPERT_PARTS = {
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
    "gate_proj": "gate_proj",
    "down_proj": "down_proj",
    "up_proj": "up_proj",
}

# Reasons to leave a parameter out, by how its name begins, and by what is in it.
OTHER_TOWERS = {
    "vision_tower.": "images are not read: it is the vision tower",
    "vision_model.": "images are not read: it is the vision tower",
    "vision_encoder.": "images are not read: it is the vision tower",
    "multi_modal_projector.": "images are not read: it joins the vision tower to the text model",
    "patch_merger.": "images are not read: it joins the vision tower to the text model",
    "vision_language_adapter.": "images are not read: it joins the vision tower to the text model",
}
NEEDLESS = {
    "rotary_emb.inv_freq": "it follows from config.json",
    "activation_scale": "activations stay floats",
    "input_scale": "activations stay floats",
}


HFConfig = dict[str, Any]


def normalize(config: HFConfig, weights: Weights, *, stock: bool = False) -> None:
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
        decode_prequantized(config, weights)
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
        rows: the expected shape.
        first: the answer where both fit.
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
            array = dequantized([array, *parts], layout)
            weights.origins[name] = Origin(name, str(layout), layout.bits_per_weight)
        each = array.reshape(heads, -1, array.shape[-1])  # (H, width + values, latent)
        targets = {
            f"{base}.embed_q.weight": each[:, :width].swapaxes(-1, -2),
            f"{base}.unembed_out.weight": each[:, width:],
        }
        weights.part(name, targets)
