"""Every architecture as a row of a table: its tensors in Hugging Face's terms.

Knows names and nothing else. To add an architecture, add its row to ``ARCHITECTURES``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# Modules outside the layers.
ENDS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
# Modules of one layer, below ``blk.N.`` and ``model.layers.N.``.
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_GATED = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_UNGATED = {"ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_FUSED_GATE = {"ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"}
_FFN_NORM = {"ffn_norm": "post_attention_layernorm"}
_LLAMA = {**_ATTENTION, **_FFN_NORM, **_GATED}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_AFTER_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_SANDWICH = {**_LLAMA, **_AFTER_NORMS, "ffn_norm": "pre_feedforward_layernorm"}
_SPARSE = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.switch_mlp.gate_proj",
    "ffn_up_exps": "mlp.switch_mlp.up_proj",
    "ffn_down_exps": "mlp.switch_mlp.down_proj",
}
_SPARSE_LLAMA = {**_ATTENTION, **_FFN_NORM, **_SPARSE}
_BIASED_QKV = ("attn_q", "attn_k", "attn_v")
_BIASED_ATTENTION = (*_BIASED_QKV, "attn_output")
_BIASED_FFN = ("ffn_gate", "ffn_up", "ffn_down")


def _without(names: Mapping[str, str], *left_out: str) -> dict[str, str]:
    return {name: target for name, target in names.items() if name not in left_out}


@dataclass(frozen=True)
class Architecture:
    """How one GGUF architecture is spelt in Hugging Face terms.

    Attributes:
        model_type: ``model_type`` of ``config.json``.
        class_name: the entry of ``architectures`` in ``config.json``.
        layer: module names of a layer.
        ends: module names outside the layers that differ from the usual ones.
        permuted: whether rows of queries and keys are stored for interleaved rotary embedding
            although the Hugging Face model rotates halves.
        norm_offset: what GGUF has added to the weights of norms.
        zero_biases: modules that get a zero bias where a sibling has one, because stock classes
            switch all of a group on together.
        always_biased: whether stock classes have those biases even where a file has none.
        optional: modules that a file may lack.
        norm_biases: whether norms may have biases.
        head_bias: whether the output head may have one.
    """

    model_type: str
    class_name: str
    layer: Mapping[str, str] = field(default_factory=lambda: _LLAMA)
    ends: Mapping[str, str] = field(default_factory=dict)
    permuted: bool = False
    norm_offset: float = 0.0
    zero_biases: tuple[tuple[str, ...], ...] = ()
    always_biased: bool = False
    optional: frozenset[str] = frozenset()
    norm_biases: bool = False
    head_bias: bool = False

    def may_have_bias(self, module: str) -> bool:
        """Whether a module, in GGUF's terms, may have a bias."""
        if module == "output":
            return self.head_bias
        return self.norm_biases if "norm" in module else module != "token_embd"


_LLAMA_BIASES = (_BIASED_ATTENTION, _BIASED_FFN)


def _under(names: Mapping[str, str], old: str, new: str) -> dict[str, str]:
    return {name: target.replace(old, new, 1) for name, target in names.items()}


ARCHITECTURES: dict[str, Architecture] = {
    "cohere2": Architecture("cohere2", "Cohere2ForCausalLM", _without(_LLAMA, "ffn_norm")),
    "command-r": Architecture("cohere", "CohereForCausalLM", _without(_LLAMA, "ffn_norm")),
    "deepseek2": Architecture(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        {
            "attn_norm": "input_layernorm",
            "attn_q": "self_attn.q_proj",
            "attn_q_a": "self_attn.q_a_proj",
            "attn_q_a_norm": "self_attn.q_a_layernorm",
            "attn_q_b": "self_attn.q_b_proj",
            "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
            "attn_kv_a_norm": "self_attn.kv_a_layernorm",
            "attn_k_b": "self_attn.embed_q",
            "attn_v_b": "self_attn.unembed_out",
            "attn_output": "self_attn.o_proj",
            **_FFN_NORM,
            **_GATED,
            **_SPARSE,
            "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
            "ffn_up_shexp": "mlp.shared_experts.up_proj",
            "ffn_down_shexp": "mlp.shared_experts.down_proj",
            "exp_probs_b": "mlp.gate.e_score_correction_bias",
        },
        optional=frozenset(
            {"attn_q", "attn_q_a", "attn_q_a_norm", "attn_q_b", "exp_probs_b"}
            | {*_GATED, *_SPARSE, "ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"}
        ),
    ),
    "exaone4": Architecture(
        "exaone4",
        "Exaone4ForCausalLM",
        _without(_LLAMA, "attn_norm", "ffn_norm") | _QK_NORMS | _AFTER_NORMS,
    ),
    "gemma": Architecture("gemma", "GemmaForCausalLM", norm_offset=1.0),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", _SANDWICH, norm_offset=1.0),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3ForCausalLM", _SANDWICH | _QK_NORMS, norm_offset=1.0
    ),
    "glm4": Architecture(
        "glm4",
        "Glm4ForCausalLM",
        {
            **_ATTENTION,
            "post_attention_norm": "post_self_attn_layernorm",
            **_FFN_NORM,
            "post_ffw_norm": "post_mlp_layernorm",
            **_FUSED_GATE,
        },
        zero_biases=(_BIASED_QKV,),
    ),
    "gpt-oss": Architecture(
        "gpt_oss",
        "GptOssForCausalLM",
        {
            **_ATTENTION,
            "post_attention_norm": "post_attention_layernorm",
            "attn_sinks": "self_attn.sinks",
            "ffn_gate_inp": "mlp.router",
            **_under(_without(_SPARSE, "ffn_gate_inp"), "switch_mlp", "experts"),
        },
    ),
    "granitemoe": Architecture(
        "granitemoe",
        "GraniteMoeForCausalLM",
        {
            **_under(_SPARSE_LLAMA, "mlp.", "block_sparse_moe."),
            "ffn_gate_inp": "block_sparse_moe.router.layer",
        },
        permuted=True,
        zero_biases=(_BIASED_ATTENTION,),
    ),
    "granite": Architecture(
        "granite", "GraniteForCausalLM", permuted=True, zero_biases=_LLAMA_BIASES
    ),
    "internlm2": Architecture(
        "llama", "LlamaForCausalLM", permuted=True, zero_biases=_LLAMA_BIASES
    ),
    "llama": Architecture("llama", "LlamaForCausalLM", permuted=True, zero_biases=_LLAMA_BIASES),
    # Llama with experts; GGUF has no name of its own for it.
    "mixtral": Architecture(
        "mixtral",
        "MixtralForCausalLM",
        _under(_SPARSE_LLAMA, "mlp.", "block_sparse_moe."),
        permuted=True,
    ),
    "mistral3": Architecture("ministral3", "Ministral3ForCausalLM", permuted=True),
    "nemotron": Architecture(
        "nemotron",
        "NemotronForCausalLM",
        {**_ATTENTION, **_FFN_NORM, **_UNGATED},
        norm_offset=1.0,
        zero_biases=(_BIASED_ATTENTION, ("ffn_up", "ffn_down")),
        norm_biases=True,
    ),
    "olmo2": Architecture(
        "olmo2",
        "Olmo2ForCausalLM",
        _without(_LLAMA, "attn_norm", "ffn_norm") | _QK_NORMS | _AFTER_NORMS,
    ),
    "olmoe": Architecture("olmoe", "OlmoeForCausalLM", _SPARSE_LLAMA | _QK_NORMS),
    "phi2": Architecture(
        "phi",
        "PhiForCausalLM",
        {
            **_ATTENTION,
            "attn_output": "self_attn.dense",
            "ffn_up": "mlp.fc1",
            "ffn_down": "mlp.fc2",
        },
        ends={"output_norm": "model.final_layernorm"},
        norm_biases=True,
        head_bias=True,
    ),
    "phi3": Architecture(
        "phi3",
        "Phi3ForCausalLM",
        {
            "attn_norm": "input_layernorm",
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            **_FFN_NORM,
            **_FUSED_GATE,
        },
    ),
    "qwen2": Architecture(
        "qwen2", "Qwen2ForCausalLM", zero_biases=(_BIASED_QKV,), always_biased=True
    ),
    "qwen2moe": Architecture(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {
            **_SPARSE_LLAMA,
            "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
            "ffn_up_shexp": "mlp.shared_expert.up_proj",
            "ffn_down_shexp": "mlp.shared_expert.down_proj",
            "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
        },
        zero_biases=(_BIASED_QKV,),
        always_biased=True,
    ),
    "qwen3moe": Architecture("qwen3_moe", "Qwen3MoeForCausalLM", _SPARSE_LLAMA | _QK_NORMS),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _LLAMA | _QK_NORMS),
    "seed_oss": Architecture(
        "seed_oss",
        "SeedOssForCausalLM",
        {**_ATTENTION, "post_attention_norm": "post_attention_layernorm", **_GATED},
        zero_biases=(_BIASED_QKV,),
    ),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", permuted=True),
    "stablelm": Architecture(
        "stablelm",
        "StableLmForCausalLM",
        zero_biases=(_BIASED_QKV,),
        optional=frozenset({"ffn_norm"}),
        norm_biases=True,
    ),
    "starcoder2": Architecture(
        "starcoder2",
        "Starcoder2ForCausalLM",
        {**_ATTENTION, **_FFN_NORM, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
        norm_biases=True,
    ),
}
