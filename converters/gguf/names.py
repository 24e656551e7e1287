"""Tensor names per architecture: from GGUF's to Hugging Face's, as tables.

Knows names and which rows a GGUF stores in another order; knows nothing of types or values. To add
an architecture, add its row to ``ARCHITECTURES``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

from converters.errors import UnsupportedArchitectureError
from converters.gguf.reader import GGUFFile
from converters.gguf.tensor import GGUFTensor

# Modules outside the layers.
_ENDS = {
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

# Parameters that are not called weight or bias in the model.
_WHOLE_NAMES = ("attn_sinks.weight", "exp_probs_b.bias")

# Tensors whose values move into config.json.
_IN_CONFIG = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}


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
_PERMUTED = ("attn_q", "attn_k")
NO_PLACE = "the architecture has no such parameter"


@dataclass(frozen=True)
class Mapped:
    """One tensor of the file and the parameter it becomes.

    Attributes:
        permuted: rows are to be reordered for rotating halves.
        subtract: what GGUF has added to every element.
    """

    source: GGUFTensor
    target: str
    permuted: bool
    subtract: float = 0.0

    @property
    def as_row(self) -> bool:
        """Whether a vector becomes a matrix of one row."""
        return self.target.endswith("shared_expert_gate.weight")


@dataclass(frozen=True)
class NameMap:
    """Every tensor of a file: mapped, or skipped with the reason.

    Attributes:
        mapped: in file order.
        skipped: ``(tensor, reason)``.
        zeros: parameters to fill with zeros: target name and length.
    """

    mapped: tuple[Mapped, ...]
    skipped: tuple[tuple[GGUFTensor, str], ...]
    zeros: tuple[tuple[str, int], ...]


def architecture_of(gguf: GGUFFile) -> Architecture:
    """The table row of a file's architecture.

    Raises:
        UnsupportedArchitectureError: nothing here knows it; the message names the nearest known.
    """
    name = gguf.architecture
    if name == "llama" and gguf.key("expert_count", 0):
        name = "mixtral"
    if name in ARCHITECTURES and not (gguf.architecture == name == "mixtral"):
        return ARCHITECTURES[name]
    near = get_close_matches(name, ARCHITECTURES, n=1, cutoff=0.5)
    nearest = f"; the nearest known one is {near[0]}" if near else ""
    raise UnsupportedArchitectureError(
        f"{gguf.path.name}: architecture {name!r} is not supported{nearest}",
        hint=f"Supported: {', '.join(sorted(ARCHITECTURES))}",
    )


# One spelling for each layer: two of them would be two tensors for one parameter.
_LAYER = re.compile(r"blk\.(0|[1-9][0-9]{0,8})\.(.+)")


def map_names(gguf: GGUFFile) -> NameMap:
    """Map every tensor of a file to a parameter of its Hugging Face model.

    Raises:
        UnsupportedArchitectureError: the architecture is unknown.
        GGUFError: a tensor that every model of this architecture needs is missing.
    """
    architecture = architecture_of(gguf)
    layers = int(gguf.key("block_count"))
    mapped: list[Mapped] = []
    skipped: list[tuple[GGUFTensor, str]] = []
    for tensor in gguf.tensors:
        headless = tensor.name == "output.bias" and not architecture.head_bias
        if tensor.name.endswith(".scale") or headless:
            # To leave them out, as with other tensors without a place, would change every logit.
            raise tensor.error(
                expected="no factors on whole matrices and no bias on the output", found="one"
            )
        target, permuted, reason = _target(tensor.name, architecture, layers)
        if target:
            norm = "norm" in tensor.name and tensor.name.endswith(".weight")
            subtract = architecture.norm_offset if norm else 0.0
            mapped.append(Mapped(tensor, target, permuted, subtract))
        else:
            skipped.append((tensor, reason))
    _require(gguf, architecture, layers)
    return NameMap(tuple(mapped), tuple(skipped), tuple(_zero_biases(gguf, architecture, layers)))


def _target(name: str, architecture: Architecture, layers: int) -> tuple[str, bool, str]:
    if name in _IN_CONFIG:
        return "", False, "its values are stored in config.json (rope_scaling)"
    module, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return "", False, NO_PLACE
    ends = {**_ENDS, **architecture.ends}
    if module in ends:
        if kind == "bias" and not architecture.may_have_bias(module):
            return "", False, NO_PLACE
        return f"{ends[module]}.{kind}", False, ""
    inner = _LAYER.fullmatch(module)
    if not inner:
        return "", False, NO_PLACE
    layer, module = int(inner[1]), inner[2]
    if layer >= layers:
        return "", False, f"beyond the {layers} layers of block_count (not used for generation)"
    if f"{module}.{kind}" in _WHOLE_NAMES and module in architecture.layer:
        return f"model.layers.{layer}.{architecture.layer[module]}", False, ""
    if module not in architecture.layer:
        return "", False, NO_PLACE
    target = f"model.layers.{layer}.{architecture.layer[module]}.{kind}"
    if kind == "bias" and not architecture.may_have_bias(module):
        return "", False, NO_PLACE
    return target, architecture.permuted and module in _PERMUTED, ""


def _require(gguf: GGUFFile, architecture: Architecture, layers: int) -> None:
    """Every layer must have the weight of every module; only the output head may be absent."""
    gguf.tensor("token_embd.weight")
    gguf.tensor("output_norm.weight")
    for layer in range(layers):
        for module in architecture.layer:
            if module not in architecture.optional:
                gguf.tensor(f"blk.{layer}.{module}.weight")


def _zero_biases(gguf: GGUFFile, architecture: Architecture, layers: int) -> list[tuple[str, int]]:
    zeros = []
    for group in architecture.zero_biases:
        present = architecture.always_biased or any(
            f"blk.{i}.{m}.bias" in gguf for i in range(layers) for m in group
        )
        for i in range(layers if present else 0):
            for module in group:
                if f"blk.{i}.{module}.bias" not in gguf:
                    rows = gguf.tensor(f"blk.{i}.{module}.weight").shape[0]
                    zeros.append((f"model.layers.{i}.{architecture.layer[module]}.bias", rows))
    if "exp_probs_b" in architecture.layer and gguf.key("expert_gating_func", 1) == 2:
        for i in range(layers):
            name = f"blk.{i}.ffn_gate_inp.weight"
            if name in gguf and f"blk.{i}.exp_probs_b.bias" not in gguf:
                target = f"model.layers.{i}.{architecture.layer['exp_probs_b']}"
                zeros.append((target, gguf.tensor(name).shape[0]))
    return zeros
