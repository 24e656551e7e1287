"""Names of original Hugging Face repositories to those that mlxrun and mlx-lm share.

A family that differs has a row in ``NAMINGS``. Arrays become lazy views and stacks; no weight is
read. For native families only: mlx-lm's classes rename theirs.
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
class Naming:
    """What differs in one family.

    Attributes:
        latent: whether ``kv_b_proj`` is split into ``embed_q`` and ``unembed_out``: ``always``, or
            ``native`` where mlx-lm's class has it whole, so that only mlxrun splits it.
        sensitive: modules whose weights are so small that microscaling modes lose them: 8 bits
            there (mlx-lm keeps the same ones).
    """

    experts: str | None = None  # the module of a layer that holds its stacked experts
    aliases: Mapping[str, str] = field(default_factory=dict)  # other prefixes of modules: ours
    interleaved: bool = False  # fused gate and up projections alternate row by row
    latent: str | None = None
    routers: tuple[str, ...] = ()  # modules that choose experts: 8 bits, whatever the rest gets
    plain: tuple[str, ...] = ()  # modules that mlx-lm's class cannot hold quantized
    precise: tuple[str, ...] = ()  # parameters that keep their own type
    sensitive: tuple[str, ...] = ()
    tied: bool = False  # whether the embedding is the head where the config does not say


_TIED = Naming(tied=True)
_SWITCH = "mlp.switch_mlp"
_SMALL = ("self_attn.o_proj", "mlp.down_proj", "lm_head")

# Families that are not here have mlxrun's names.
NAMINGS: dict[str, Naming] = {
    "cohere": _TIED,
    "cohere2": _TIED,
    "deepseek": Naming(_SWITCH, plain=("mlp.gate",)),
    "deepseek_v2": Naming(_SWITCH, latent="native", plain=("mlp.gate",)),
    "deepseek_v3": Naming(
        _SWITCH, latent="always", plain=("mlp.gate",), precise=("e_score_correction_bias",)
    ),
    "dots1": Naming("mlp.experts", plain=("mlp.gate",), precise=("e_score_correction_bias",)),
    "gemma": _TIED,
    "gemma2": _TIED,
    "gemma3_text": _TIED,
    "glm4_moe": Naming(_SWITCH, plain=("mlp.gate",), precise=("e_score_correction_bias",)),
    "gpt_oss": Naming("mlp.experts", interleaved=True, routers=("mlp.router",)),
    "granite": Naming(sensitive=_SMALL),
    "granitemoe": Naming(
        "block_sparse_moe.switch_mlp",
        routers=("block_sparse_moe.router.layer",),
        sensitive=_SMALL,
    ),
    "hunyuan_v1_moe": Naming(_SWITCH, routers=("mlp.gate.wg",)),
    "mixtral": Naming(
        "block_sparse_moe.switch_mlp",
        aliases={"mlp.": "block_sparse_moe."},
        routers=("block_sparse_moe.gate",),
    ),
    "olmoe": Naming(_SWITCH, routers=("mlp.gate",)),
    "qwen2_moe": Naming(_SWITCH, routers=("mlp.gate", "shared_expert_gate")),
    "qwen3_moe": Naming(_SWITCH, routers=("mlp.gate",)),
}


def naming_of(config: Mapping[str, Any]) -> Naming:
    """The row of a native family."""
    return NAMINGS.get(str(config.get("model_type")), Naming())


# Models of text and images: the native families of their text models.
TEXT_MODELS = {"gemma3": ("gemma3_text",), "mistral3": ("mistral", "ministral3", "llama")}
# Keys that their text_config may leave out: defaults of transformers' Gemma3TextConfig; the others
# state everything.
TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
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
EXPERT_PROJECTIONS = {
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
    **{name: name for name in ("gate_proj", "down_proj", "up_proj")},
}

# Parameters that are left out, by the start of their names or by the end, and why.
OTHER_TOWERS = {
    **dict.fromkeys(
        ("vision_tower.", "vision_model.", "vision_encoder."),
        "images are not read: it is the vision tower",
    ),
    **dict.fromkeys(
        ("multi_modal_projector.", "patch_merger.", "vision_language_adapter."),
        "images are not read: it joins the vision tower to the text model",
    ),
}
_NEEDLESS = {
    "rotary_emb.inv_freq": "it follows from config.json",
    "activation_scale": "activations stay floats",
    "input_scale": "activations stay floats",
}

# Starts of names where the text model is a part of a larger model, and its own.
_PREFIXES = {
    "language_model.": "",
    "model.language_model.": "model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}

HFConfig = dict[str, Any]


def normalize(config: HFConfig, weights: Weights, *, stock: bool = False) -> None:
    """Rename and reshape the weights of a native family in place.

    Args:
        config: of the text model; see :func:`text_config`.
        stock: stop where mlx-lm's class of the family stops.

    Raises:
        CheckpointError: arrays are missing or have shapes that contradict ``config.json``.
    """
    naming = naming_of(config)
    try:
        for name in list(weights.arrays):
            target = text_name(name, naming)
            if target != name:
                weights.move(name, target)
        _leave_out(config, weights, naming)
        decode_prequantized(config, weights)
        if naming.experts:
            _stack_experts(weights, naming.experts)
            _split_experts(config, weights, naming)
        if naming.latent == "always" or (naming.latent and not stock):
            _split_latent(config, weights)
    except (KeyError, TypeError, ValueError) as error:
        # MLX refuses shapes with ValueError; a key is one of the config's or of the weights'.
        raise CheckpointError(f"config.json and the weights do not agree: {error}") from error


def text_config(config: HFConfig) -> HFConfig:
    """The configuration of the text model of a model of text and images; others as they are."""
    inner = config.get("text_config")
    kind = str(config.get("model_type"))
    if kind not in TEXT_MODELS or not isinstance(inner, dict):
        return config
    shared = {key: config[key] for key in _SHARED if key in config}
    text = {**TEXT_DEFAULTS[kind], **shared, **inner}
    return text if text["model_type"] in TEXT_MODELS[kind] else config


_SHARED = (
    "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype", "quantization",
    "quantization_config", "tie_word_embeddings",
)  # fmt: skip


def form_of(config: HFConfig) -> Callable[[str, Layout], Layout | None]:
    """The layout of a module of a native family for a requested one; None: only floats."""
    naming = naming_of(config)

    def form(module: str, asked: Layout) -> Layout | None:
        if module.endswith(naming.plain):
            return None
        low = module.endswith(naming.routers) and asked.bits < EIGHT_BITS.bits
        lost = module.endswith(naming.sensitive) and asked.mode != "affine"
        return EIGHT_BITS if low or lost else asked

    return form


def stays(config: HFConfig, name: str) -> bool:
    """Whether a parameter of a native family keeps its own dtype."""
    return name.endswith(naming_of(config).precise)


_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def text_name(name: str, naming: Naming) -> str:
    """The name of a parameter or module in the text model: without the larger model's prefix."""
    name = _replaced(name, _PREFIXES)
    layer = _LAYER.match(name)
    return layer[0] + _replaced(name[layer.end() :], naming.aliases) if layer else name


def _replaced(name: str, prefixes: Mapping[str, str]) -> str:
    """The name with its first known prefix replaced."""
    old = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
    return name if old is None else prefixes[old] + name.removeprefix(old)


def _leave_out(config: HFConfig, weights: Weights, naming: Naming) -> None:
    """Skip parameters that the text model does not have, each with the reason."""
    layers = int(config.get("num_hidden_layers", 0))
    tied = bool(config.get("tie_word_embeddings", naming.tied))
    for name in list(weights.arrays):
        layer = _LAYER.match(name)
        reasons = [why for start, why in OTHER_TOWERS.items() if name.startswith(start)]
        reasons += [why for end, why in _NEEDLESS.items() if name.endswith(end)]
        if tied and name.startswith("lm_head."):
            reasons = ["the embedding serves as the head"]
        elif layer and int(layer[1]) >= layers:
            reasons = [f"beyond the {layers} layers of config.json (not used for generation)"]
        if reasons:
            weights.skip(name, reasons[0])


_EXPERT = re.compile(
    r"(model\.layers\.\d+\.).+\.experts\.(\d+)\.(\w+)\.(weight|scales|biases|bias)"
)


def _stack_experts(weights: Weights, home: str) -> None:
    """Experts stored one by one, ``experts.N.w1``, as one stack."""
    stacks: dict[str, dict[int, str]] = {}
    for name in weights.arrays:
        found = _EXPERT.fullmatch(name)
        if found and found[3] in EXPERT_PROJECTIONS:
            target = f"{found[1]}{home}.{EXPERT_PROJECTIONS[found[3]]}.{found[4]}"
            stacks.setdefault(target, {})[int(found[2])] = name
    for target, members in stacks.items():
        missing = next((number for number in range(len(members)) if number not in members), None)
        if missing is not None:
            module = members[min(members)].split(".experts.")[0]
            raise CheckpointError(
                f"expert {missing} of {module} is not among the weights", hint="Download it again"
            )
        weights.stack([members[number] for number in range(len(members))], target)


_FUSED = re.compile(
    r"(model\.layers\.\d+\.)(?:.+\.)?"
    r"(experts\.gate_up_proj|experts\.down_proj|input_linear|output_linear)"
    r"(?:(?:\.|_(?=bias$))(\w+))?"
)
_DOWN = ("experts.down_proj", "output_linear")


def _split_experts(config: HFConfig, weights: Weights, naming: Naming) -> None:
    """Gate and up projections of all experts in one array, as two; one orientation for all."""
    width = int(config.get("moe_intermediate_size") or config["intermediate_size"])
    rows = 2 * width, int(config["hidden_size"])
    found = [match for name in weights.arrays if (match := _FUSED.fullmatch(name))]
    transposed: dict[str, bool] = {}
    # Gate and up first: their shape tells the orientation of the layer's experts.
    for match in sorted(found, key=lambda match: match[2] in _DOWN):
        name, layer, kind = match[0], match[1], match[3] or "weight"
        array, home = weights.arrays[name], f"{layer}{naming.experts}"
        fused = match[2] not in _DOWN
        if fused and kind == "weight" and name.rpartition(".")[0] not in weights.layouts:
            transposed[layer] = _transposed(array.shape, rows, naming.interleaved)
        if kind == "weight" and transposed.get(layer):
            array = array.swapaxes(-1, -2)
        if not fused:
            weights.part(name, {f"{home}.down_proj.{kind}": array})
            continue
        halves = [array[:, ::2], array[:, 1::2]] if naming.interleaved else mx.split(array, 2, 1)
        targets = (f"{home}.{part}.{kind}" for part in ("gate_proj", "up_proj"))
        weights.part(name, dict(zip(targets, halves, strict=True)))


def _transposed(shape: tuple[int, ...], rows: tuple[int, int], first: bool) -> bool:
    """Whether matrices are stored as (columns, rows): they were multiplied from the left.

    Args:
        rows: the expected shape.
        first: the answer where both fit.
    """
    fits, fits_transposed = shape[-2:] == rows, shape[-2:] == rows[::-1]
    return fits_transposed and (first or not fits)


def _split_latent(config: HFConfig, weights: Weights) -> None:
    """The keys' and the values' way out of the latent space, a matrix per head (DeepSeek V2)."""
    heads, width = int(config["num_attention_heads"]), int(config["qk_nope_head_dim"])
    for name in [name for name in weights.arrays if name.endswith(".kv_b_proj.weight")]:
        module = name.removesuffix(".weight")
        base = module.removesuffix(".kv_b_proj")
        layout, parts = weights.layout(name), weights.parts(name)
        array = weights.arrays[name]
        if layout is not None:
            del weights.layouts[module]
            array = dequantized([array, *map(weights.arrays.pop, parts[1:])], layout)
            weights.origins[name] = Origin(name, str(layout), layout.bits_per_weight)
        each = array.reshape(heads, -1, array.shape[-1])  # (H, width + values, latent)
        targets = {
            f"{base}.embed_q.weight": each[:, :width].swapaxes(-1, -2),
            f"{base}.unembed_out.weight": each[:, width:],
        }
        weights.part(name, targets)
