"""Qwen 1 to 3, dense and MoE; those with linear attention are in ``linear_attention.py``."""

from __future__ import annotations

from functools import partial

from converters.architectures import names
from converters.architectures.base import Architecture, as_row, fused_qkv
from converters.architectures.hyperparameters import Config, Hyperparameters


def _qwen2moe(hp: Hyperparameters) -> Config:
    shared = hp.tensor("blk.0.ffn_up_shexp.weight").shape[0]
    return {"shared_expert_intermediate_size": shared, "norm_topk_prob": False}


def _qwen3moe(hp: Hyperparameters) -> Config:
    if hp.architecture == "qwen3vlmoe":
        hp.text_rope(interleaved=True)
    return {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}


_QWEN3_MOE = Architecture(
    "qwen3_moe", "Qwen3MoeForCausalLM", names.MOE_LLAMA | names.QK_NORMS, keys=_qwen3moe
)

_qwen2 = partial(
    Architecture, "qwen2", "Qwen2ForCausalLM", zero_biases=(names.QKV,), always_biased=True
)

ROWS: dict[str, Architecture] = {
    "qwen": _qwen2(
        # The key counts gate and up together.
        keys=lambda hp: {"intermediate_size": hp["intermediate_size"] // 2},
        parts={"attn_qkv": fused_qkv},
    ),
    "qwen2": _qwen2(),
    "qwen2moe": Architecture(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {**names.MOE_LLAMA, **names.GATED_SHARED_EXPERT},
        keys=_qwen2moe,
        reshape={"ffn_gate_inp_shexp": as_row},
        zero_biases=(names.QKV,),
        always_biased=True,
    ),
    "qwen2vl": _qwen2(keys=lambda hp: hp.text_rope(interleaved=False)),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", names.LLAMA | names.QK_NORMS),
    "qwen3moe": _QWEN3_MOE,
    "qwen3vl": Architecture(
        "qwen3",
        "Qwen3ForCausalLM",
        names.LLAMA | names.QK_NORMS,
        keys=lambda hp: hp.text_rope(interleaved=True),
    ),
    "qwen3vlmoe": _QWEN3_MOE,
}
