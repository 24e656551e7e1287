"""Dense architectures that compute what a model with another name computes.

Their files become that model, which every runtime knows: a Llama with another tokenizer is a Llama.
"""

from __future__ import annotations

from converters.gguf.architectures.keys import fused_qkv, hunyuan, stablelm
from converters.gguf.architectures.limits import text_alone
from converters.gguf.architectures.row import (
    ATTENTION,
    BIASED_ATTENTION,
    BIASED_QKV,
    FFN_NORM,
    HUNYUAN_NORMS,
    LLAMA,
    LLAMA_BIASES,
    PERMUTED,
    QK_NORMS,
    UNGATED,
    Architecture,
    Config,
    halves,
)
from converters.gguf.numbers import float_of
from converters.gguf.reader import GGUFFile


def _minicpm(gguf: GGUFFile, config: Config) -> Config:
    """Granite's multipliers; files of before there were keys for them are of the first models."""
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    # Without a logit_scale llama.cpp divides logits by the inverse of what the model has.
    return {
        "embedding_multiplier": float_of(gguf, "embedding_scale", 12.0),
        "residual_multiplier": float_of(gguf, "residual_scale", 1.4 / layers**0.5),
        "logits_scaling": float_of(gguf, "logit_scale", hidden / 256),
        "attention_multiplier": config["head_dim"] ** -0.5,
    }


def _of_text(gguf: GGUFFile, config: Config) -> Config:
    text_alone(gguf, config, interleaved=gguf.architecture == "qwen3vl")
    return {}


BORROWED: dict[str, Architecture] = {
    "codeshell": Architecture(
        "starcoder2",
        "Starcoder2ForCausalLM",
        {**ATTENTION, **FFN_NORM, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
        keys=lambda gguf, config: {"hidden_act": "gelu_pytorch_tanh", "use_bias": True},
        epsilon="norm_epsilon",
        norm_biases=True,
    ),
    "ernie4_5": Architecture(
        "llama",
        "LlamaForCausalLM",
        keys=lambda gguf, config: {"rope_traditional": True},
        zero_biases=LLAMA_BIASES,
    ),
    "exaone": Architecture("llama", "LlamaForCausalLM", zero_biases=LLAMA_BIASES),
    "internlm2": Architecture(
        "llama", "LlamaForCausalLM", order=PERMUTED, zero_biases=LLAMA_BIASES
    ),
    "jais2": Architecture(
        "nemotron",
        "NemotronForCausalLM",
        {**ATTENTION, **FFN_NORM, **UNGATED},
        keys=lambda gguf, config: {"hidden_act": "relu2"},
        epsilon="norm_eps",
        norm_offset=1.0,  # Nemotron's norms store their distance from one
        zero_biases=(BIASED_ATTENTION, ("ffn_up", "ffn_down")),
        norm_biases=True,
    ),
    "maincoder": Architecture(
        "hunyuan_v1_dense",
        "HunYuanDenseV1ForCausalLM",
        LLAMA | HUNYUAN_NORMS,
        keys=hunyuan,
        # Norms come after the rotation, so their weights go where its pairs go.
        order={**PERMUTED, "attn_q_norm": halves, "attn_k_norm": halves},
        zero_biases=(BIASED_ATTENTION,),
    ),
    "minicpm": Architecture(
        "granite",
        "GraniteForCausalLM",
        keys=_minicpm,
        order=PERMUTED,
        zero_biases=LLAMA_BIASES,
    ),
    "orion": Architecture(
        "stablelm",
        "StableLmForCausalLM",
        keys=stablelm,
        epsilon="layer_norm_eps",
        zero_biases=(BIASED_QKV,),
        norm_biases=True,
    ),
    "paddleocr": Architecture("llama", "LlamaForCausalLM", keys=_of_text, zero_biases=LLAMA_BIASES),
    "pangu-embedded": Architecture("llama", "LlamaForCausalLM", zero_biases=LLAMA_BIASES),
    "qwen": Architecture(
        "qwen2",
        "Qwen2ForCausalLM",
        # The key counts the rows of gate and up together.
        keys=lambda gguf, config: {"intermediate_size": config["intermediate_size"] // 2},
        parts={"attn_qkv": fused_qkv},
        zero_biases=(BIASED_QKV,),
        always_biased=True,
    ),
    "qwen2vl": Architecture(
        "qwen2",
        "Qwen2ForCausalLM",
        keys=_of_text,
        zero_biases=(BIASED_QKV,),
        always_biased=True,
    ),
    "qwen3vl": Architecture("qwen3", "Qwen3ForCausalLM", LLAMA | QK_NORMS, keys=_of_text),
    "xverse": Architecture("llama", "LlamaForCausalLM", order=PERMUTED),
}
