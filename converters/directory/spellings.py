"""How the original repositories of our families spell what mlxrun and mlx-lm call otherwise.

A table: a family that differs has a row. ``names`` turns rows into renamings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Spelling:
    """One family.

    Attributes:
        experts: the module of a layer that holds its stacked experts.
        aliases: other beginnings of a layer's modules, and what they are called here.
        interleaved: whether fused gate and up projections alternate row by row.
        latent: whether ``kv_b_proj`` is parted into ``embed_q`` and ``unembed_out``; ``reading``
            where mlx-lm's class wants it whole, so that only mlxrun parts it.
        routers: modules that choose experts: 8 bits, whatever the rest gets.
        plain: modules that mlx-lm's class cannot hold quantised.
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
