"""Metadata and shapes that no model can have."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import numpy as np

from converters.gguf.file import GGUFFile
from converters.gguf.types import show

_U32: Final = 2**32 - 1
MAX_BLOCKS: Final = 512  # llama.cpp's own bound


class Range(NamedTuple):
    """Allowed values of a number, without ``low`` itself if ``above`` is set."""

    low: float = -math.inf
    high: float = math.inf
    integer: bool = True
    above: bool = False

    def __str__(self) -> str:
        if self.integer:
            return f"an integer from {self.low} to {self.high}"
        if self.low == -math.inf:
            return "a finite number"
        return f"a finite number {'above' if self.above else 'of at least'} {self.low:g}"

    def holds(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.integer else (int, float)):
            return False
        if not self.integer:  # models compute with float32, whatever the file stores
            with np.errstate(over="ignore"):
                value = float(np.float32(value))
        inside = self.low < value if self.above else self.low <= value
        return inside and value <= self.high and (self.integer or math.isfinite(value))


_FINITE: Final = Range(integer=False)
_NOT_NEGATIVE: Final = Range(0, integer=False)
_POSITIVE: Final = Range(0, integer=False, above=True)

#: Keys of the architecture (without its prefix) that hold one number.
NUMBERS: Final[dict[str, Range]] = {
    "block_count": Range(1, MAX_BLOCKS),
    "context_length": Range(1, _U32),
    "embedding_length": Range(1, _U32),
    "features_length": Range(1, _U32),
    "vocab_size": Range(1, _U32),
    "expert_count": Range(0, 65_535),
    "attention.key_length": Range(0, _U32),
    "attention.value_length": Range(0, _U32),
    "rope.dimension_count": Range(0, _U32),
    "rope.freq_base": _POSITIVE,
    "rope.freq_base_swa": _POSITIVE,
    "rope.scale_linear": _NOT_NEGATIVE,
    "rope.scaling.factor": _NOT_NEGATIVE,
    "rope.scaling.attn_factor": _NOT_NEGATIVE,
    "rope.scaling.original_context_length": Range(0, _U32),
    "rope.scaling.yarn_beta_fast": _POSITIVE,
    "rope.scaling.yarn_beta_slow": _POSITIVE,
    "rope.scaling.yarn_log_multiplier": _FINITE,
    "attention.layer_norm_epsilon": _NOT_NEGATIVE,
    "attention.layer_norm_rms_epsilon": _NOT_NEGATIVE,
    "attention.group_norm_epsilon": _NOT_NEGATIVE,
    "attn_logit_softcapping": _FINITE,
    "final_logit_softcapping": _FINITE,
    "logit_scale": _FINITE,
    "residual_scale": _FINITE,
    "embedding_scale": _FINITE,
}

#: Keys of the architecture that hold one number, or one for each block.
PER_BLOCK: Final[dict[str, Range]] = {
    "attention.head_count": Range(0, _U32),
    "attention.head_count_kv": Range(0, _U32),
    "feed_forward_length": Range(0, _U32),
    "expert_feed_forward_length": Range(0, _U32),
    "expert_used_count": Range(0, 65_535),
}

STRINGS: Final = ("tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template")
BOOLEANS: Final = tuple(
    f"tokenizer.ggml.{name}"
    for name in (
        "add_bos_token",
        "add_eos_token",
        "add_sep_token",
        "add_space_prefix",
        "remove_extra_whitespaces",
    )
)
TOKENS: Final = "tokenizer.ggml.tokens"
SCORES: Final = "tokenizer.ggml.scores"
TOKEN_TYPE: Final = "tokenizer.ggml.token_type"
MERGES: Final = "tokenizer.ggml.merges"

_TOKEN_ID: Final = re.compile(r"tokenizer\.ggml\.\w+_token_id")
_BLOCK: Final = re.compile(r"blk\.([0-9]{1,9})\.")


def validate(file: GGUFFile) -> None:
    """Raise GGUFError for the first value that is impossible, whatever the architecture."""
    architecture = file.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise file.error("general.architecture", expected="a string naming the model's family")
    _check_types(file)
    _check_attention(file)
    _check_experts(file)
    _check_vocabulary(file)
    _check_tensors(file)


def _check_types(file: GGUFFile) -> None:
    prefix = f"{file.architecture}."
    for key, value in file.metadata.items():
        suffix = key.removeprefix(prefix) if key.startswith(prefix) else ""
        if key in STRINGS or suffix == "rope.scaling.type":
            if not isinstance(value, str):
                raise file.error(key, expected="a string")
        elif key in BOOLEANS:
            if not isinstance(value, bool):
                raise file.error(key, expected="a boolean")
        elif suffix in NUMBERS:
            if not NUMBERS[suffix].holds(value):
                raise file.error(key, expected=str(NUMBERS[suffix]))
        elif suffix and suffix not in PER_BLOCK and _has_nan(value):
            raise file.error(key, expected="a number", found="NaN")
    for suffix, allowed in PER_BLOCK.items():
        if prefix + suffix in file.metadata:
            _check_per_block(file, suffix, allowed)


def _check_per_block(file: GGUFFile, suffix: str, allowed: Range) -> None:
    value = file.key(suffix)
    if not isinstance(value, np.ndarray):
        if not allowed.holds(value):
            raise file.key_error(suffix, expected=f"{allowed}, or one for each block")
        return
    blocks = file.key("block_count", None)
    if blocks is None:
        key = f"{file.architecture}.{suffix}"
        expected = f"a number of blocks, as {key} has one number for each"
        raise file.key_error("block_count", expected=expected)
    if len(value) != blocks:
        raise file.key_error(suffix, expected=f"one number for each of the {blocks} blocks")
    for index, number in enumerate(value.tolist()):
        if not allowed.holds(number):
            expected = f"{allowed} for block {index}"
            raise file.key_error(suffix, expected=expected, found=show(number))


def _has_nan(value: object) -> bool:
    return isinstance(value, np.ndarray | float) and bool(np.isnan(value).any())


def _per_block(file: GGUFFile, suffix: str, default: int | list[int]) -> list[int]:
    """One number for each block (one, if blocks are not counted); a scalar stands for all."""
    value = file.key(suffix, default)
    if isinstance(value, int):
        return [value] * file.key("block_count", 1)
    return [int(number) for number in value]


def _check_attention(file: GGUFFile) -> None:
    """Heads, groups of heads, and head size.

    State-space models have no heads, hybrids none in some blocks, and there are blocks with query
    heads alone: zero is impossible only if no block has heads.
    """
    heads = _per_block(file, "attention.head_count", 0)
    groups = _per_block(file, "attention.head_count_kv", heads)
    state_space = any(
        key.startswith((f"{file.architecture}.ssm.", f"{file.architecture}.wkv."))
        for key in file.metadata
    )
    stated = file.key("attention.head_count", None) is not None
    if stated and not any(heads) and not state_space:
        raise file.key_error("attention.head_count", expected="at least one attention head")
    for index, (query, group) in enumerate(zip(heads, groups, strict=True)):
        if group and query % group:
            expected = f"a divisor of the {query} attention heads of block {index}"
            raise file.key_error("attention.head_count_kv", expected=expected, found=str(group))
    if any(heads) and not any(groups) and not state_space:
        raise file.key_error("attention.head_count_kv", expected="at least one key-value head")
    _check_head_size(file, next(filter(None, heads), 0))


def _check_head_size(file: GGUFFile, heads: int) -> None:
    """``heads``: of the first block that has any, else 0."""
    embedding = file.key("embedding_length", 0)
    if not heads or not embedding:
        return
    size = file.key("attention.key_length", None)
    if size is None:
        if embedding % heads:
            raise file.key_error(
                "attention.head_count",
                expected=f"a divisor of the embedding length {embedding}, "
                "as there is no attention.key_length",
                found=str(heads),
            )
        size = embedding // heads
    if size == 0:
        raise file.key_error("attention.key_length", expected="a head of at least 1 element")
    if file.key("rope.dimension_count", 0) > size:
        raise file.key_error("rope.dimension_count", expected=f"at most {size}, the size of a head")


def _check_experts(file: GGUFFile) -> None:
    experts = file.key("expert_count", 0)
    used = max(_per_block(file, "expert_used_count", 0))
    if experts > 1 and used > experts:
        expected = f"at most {experts}, the number of experts"
        raise file.key_error("expert_used_count", expected=expected, found=str(used))


def _check_vocabulary(file: GGUFFile) -> None:
    """Token lists of one length, merges of strings, special tokens inside the vocabulary."""
    if not _is_strings(file.get(MERGES, [])):
        raise file.error(MERGES, expected="an array of strings")
    if TOKENS not in file.metadata:
        return
    tokens = file.get(TOKENS)
    if not _is_strings(tokens) or not tokens:
        raise file.error(TOKENS, expected="an array of strings, one for each token")
    for key, kinds, what in ((SCORES, "fiu", "numbers"), (TOKEN_TYPE, "iu", "integers")):
        value = file.get(key)
        fits = isinstance(value, np.ndarray) and value.dtype.kind in kinds
        if key in file.metadata and not (fits and len(value) == len(tokens)):
            expected = f"an array of {len(tokens)} {what}, one for each token"
            raise file.error(key, expected=expected)
    if _has_nan(file.get(SCORES)):
        raise file.error(SCORES, expected="numbers", found="NaN among them")
    inside = Range(0, len(tokens) - 1)
    for key, value in file.metadata.items():
        if _TOKEN_ID.fullmatch(key) and not inside.holds(value):
            raise file.error(key, expected=f"the id of a token, {inside}")


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and (not value or isinstance(value[0], str))


def _check_tensors(file: GGUFFile) -> None:
    """Blocks and vocabulary of the metadata against the tensors."""
    blocks = file.key("block_count", None)
    for tensor in file.tensors if blocks is not None else ():
        match = _BLOCK.match(tensor.name)
        if match and int(match[1]) >= blocks:
            expected = f"a block below {file.architecture}.block_count, {blocks}"
            raise tensor.error(expected=expected, found=f"block {match[1]}")
    if "token_embd.weight" not in file:
        return
    tensor = file.tensor("token_embd.weight")
    if len(tensor.shape) != 2:
        raise tensor.error(expected="2 dimensions", found=str(len(tensor.shape)))
    rows, columns = tensor.shape
    different_input = file.key("features_length", None) is not None
    width = "features_length" if different_input else "embedding_length"
    for key, value, size in (
        (f"{file.architecture}.{width}", file.key(width, columns), columns),
        (f"{file.architecture}.vocab_size", file.key("vocab_size", rows), rows),
        (TOKENS, len(file.get(TOKENS, range(rows))), rows),
    ):
        if value != size:
            expected = f"{size}, as token_embd.weight is {rows} x {columns}"
            raise file.error(key, expected=expected, found=str(value))


# --- shapes ---------------------------------------------------------------------------------------

Shape = tuple[int, ...]


def check_shapes(gguf: GGUFFile, config: Mapping[str, Any]) -> None:
    """Compare every known tensor with the hyperparameters of ``config.json``."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    ends = {
        "token_embd": (vocabulary, hidden),
        "output": (vocabulary, hidden),
        "output_norm": (hidden,),
    }
    layer = _layer_shapes(config)
    for tensor in gguf.tensors:
        module, _, kind = tensor.name.rpartition(".")
        shape = ends.get(module) or layer.get(module.split(".", 2)[-1])
        if shape is None or kind not in ("weight", "bias"):
            continue
        expected = shape if kind == "weight" else shape[: max(1, len(shape) - 1)]
        if tensor.shape != expected:
            raise tensor.error(expected=f"{_show(expected)} weights", found=_show(tensor.shape))


def _layer_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    hidden, dim, inner = config["hidden_size"], config["head_dim"], config["intermediate_size"]
    queries = config["num_attention_heads"] * dim
    keys = config["num_key_value_heads"] * dim
    shapes: dict[str, Shape] = {
        "attn_norm": (hidden,),
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, queries),
        "attn_q_norm": (dim,),
        "attn_k_norm": (dim,),
        "ffn_norm": (hidden,),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
        "post_attention_norm": (hidden,),
        "post_ffw_norm": (hidden,),
    }
    experts = config.get("num_experts", 0)
    if experts:
        width = config["moe_intermediate_size"]
        shapes |= {
            "ffn_gate_inp": (experts, hidden),
            "ffn_gate_exps": (experts, width, hidden),
            "ffn_up_exps": (experts, width, hidden),
            "ffn_down_exps": (experts, hidden, width),
            "attn_sinks": (config["num_attention_heads"],),
        }
    kind = config["model_type"]
    if "kv_lora_rank" in config:  # the loader checks the tensors of latent attention
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            del shapes[name]
    if kind in ("minimax", "olmo2", "olmo3", "olmoe"):  # queries and keys are normalized as a whole
        shapes |= {"attn_q_norm": (queries,), "attn_k_norm": (keys,)}
    if kind == "cohere":  # heads have weights of their own
        shapes |= {"attn_q_norm": (queries // dim, dim), "attn_k_norm": (keys // dim, dim)}
    if kind in ("glm", "glm4", "phi3"):  # gate and up in one
        shapes["ffn_up"] = (2 * inner, hidden)
    if kind == "phi3":
        shapes["attn_qkv"] = (queries + 2 * keys, hidden)
    return shapes


def _show(shape: Shape) -> str:
    return " x ".join(str(size) for size in shape)
