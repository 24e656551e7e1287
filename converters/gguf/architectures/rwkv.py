"""RWKV 7: a recurrence over matrices, without attention."""

from __future__ import annotations

from collections.abc import Sequence

from converters.gguf.architectures.keys import only
from converters.gguf.architectures.row import Architecture, Config, Names, Shape
from converters.gguf.numbers import scalar
from converters.gguf.reader import GGUFFile

# Of every RWKV 7 model there is.
_HEAD = 64
_MIXED = "rwkvag"
_LOW_RANK = {
    f"time_mix_{x}{part}": f"attn.{x}_lora.lora.{target}"
    for x in "wavg"
    for part, target in (("1", "0"), ("2", "2"))
}
_OFFSETS = {f"time_mix_{x}0.weight": f"attn.{x}_lora.lora.2.bias" for x in "wav"}


def _heads(shape: Shape) -> Shape:
    return (shape[0] // _HEAD, _HEAD)


def _lerp(gguf: GGUFFile) -> Sequence[tuple[str, int]]:
    """How far each of the inputs looks back, which GGUF stacks."""
    return [(f"time_mix_lerp_{x}", 1) for x in _MIXED]


def _placeholders(gguf: GGUFFile, layer: int) -> Names:
    """The first layer mixes no earlier values; GGUF fills their place."""
    if layer:
        return {}
    return {"time_mix_v0.weight": "", "time_mix_v1": "", "time_mix_v2": ""}


def _rwkv7(gguf: GGUFFile, config: Config) -> Config:
    only(gguf, "wkv.head_size", _HEAD)
    if config["hidden_size"] % _HEAD:
        key = f"{gguf.architecture}.embedding_length"
        raise gguf.error(key, expected=f"a multiple of {_HEAD}, the width of a head")
    ranks = {"decay": "decay", "a": "iclr", "v": "value_residual_mix", "gate": "gate"}
    return {
        "head_dim": _HEAD,
        "num_heads": config["hidden_size"] // _HEAD,
        "norm_bias": True,
        **{
            f"{name}_low_rank_dim": scalar(gguf, f"attention.{rank}_lora_rank")
            for name, rank in ranks.items()
        },
    }


RWKV7 = Architecture(
    "rwkv7",
    "RWKV7ForCausalLM",
    {
        "attn_norm": "attn_norm",
        "attn_norm_2": "ffn_norm",
        **_LOW_RANK,
        **_OFFSETS,
        **{f"time_mix_lerp_{x}.weight": f"attn.x_{x}" for x in _MIXED},
        "time_mix_k_k.weight": "attn.k_k",
        "time_mix_k_a.weight": "attn.k_a",
        "time_mix_r_k.weight": "attn.r_k",
        "time_mix_receptance": "attn.r_proj",
        "time_mix_key": "attn.k_proj",
        "time_mix_value": "attn.v_proj",
        "time_mix_output": "attn.o_proj",
        "time_mix_ln": "attn.g_norm",
        "channel_mix_lerp_k.weight": "ffn.x_k",
        "channel_mix_key": "ffn.key",
        "channel_mix_value": "ffn.value",
    },
    by_layer=_placeholders,
    ends={"token_embd": "model.embeddings", "token_embd_norm": "model.layers.0.pre_norm"},
    keys=_rwkv7,
    epsilon="norm_eps",
    reshape={
        **{f"time_mix_lerp_{x}.weight": lambda shape: (1, 1, shape[-1]) for x in _MIXED},
        **{f"time_mix_{x}.weight": _heads for x in ("k_k", "k_a", "r_k")},
        "time_mix_ln": _heads,
        "time_mix_ln.bias": _heads,
        "channel_mix_lerp_k.weight": lambda shape: shape[-1:],
    },
    parts={"time_mix_lerp_fused": _lerp},
    norm_biases=True,
    own_shapes=True,
)
