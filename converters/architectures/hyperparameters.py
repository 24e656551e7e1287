"""Hyperparameters of a GGUF file, the sections that families share, and refusals."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from converters.errors import GGUFError
from converters.gguf.file import GGUFTensor
from converters.gguf.reader import GGUFFile

Config = dict[str, Any]


def tidy(value: Any) -> float:
    """A float32 as its shortest decimal."""
    return float(str(np.float32(value)))


class Hyperparameters:
    """The keys of a file as numbers, the sections of ``config.json`` that families share, refusals.

    A refusal is a GGUFError. Model classes of mlx-lm have constants where llama.cpp has keys; a
    file with other values is refused, not run with the class's.

    Attributes:
        gguf: its tensors are those of the model.
        config: the common keys of ``config.json``; ``hp[key]`` is one of them.
    """

    def __init__(self, gguf: GGUFFile, config: Config | None = None) -> None:
        self.gguf = gguf
        self.config: Config = config or {}

    def __getitem__(self, key: str) -> Any:
        return self.config[key]

    def __contains__(self, tensor: str) -> bool:
        return tensor in self.gguf

    @property
    def architecture(self) -> str:
        return self.gguf.architecture

    def tensor(self, name: str) -> GGUFTensor:
        return self.gguf.tensor(name)

    def in_layers(self, module: str) -> list[bool]:
        """Whether each layer has a tensor."""
        return [f"blk.{i}.{module}" in self.gguf for i in range(self.layers)]

    # -------------------------------------------------------------------------------- keys

    def key(self, suffix: str, *default: Any) -> Any:
        """The value of the architecture's own key, e.g. ``block_count``."""
        return self.gguf.key(suffix, *default)

    def integer(self, suffix: str, *default: int) -> int:
        """A whole number; one per layer is allowed if they are equal."""
        value = self.key(suffix, *default)
        if isinstance(value, np.ndarray | list):
            distinct = sorted({int(x) for x in value})
            self.refuse_if(
                len(distinct) != 1,
                suffix,
                "one value for all layers in this architecture",
                f"the values {distinct[:8]}",
            )
            return distinct[0]
        self.refuse_if(isinstance(value, str | bool), suffix, "a whole number")
        return int(value)

    def flag(self, suffix: str, default: bool) -> bool:
        value = self.key(suffix, default)
        self.refuse_if(not isinstance(value, bool | int), suffix, "true or false")
        return bool(value)

    def number(self, suffix: str, *default: float) -> float:
        value = self.key(suffix, *default)
        self.refuse_if(not isinstance(value, int | float), suffix, "a number")
        return tidy(value)

    @cached_property
    def layers(self) -> int:
        """Layers without those for multi-token prediction, which come last."""
        blocks, ahead = self.integer("block_count"), self.integer("nextn_predict_layers", 0)
        expected = f"fewer than {blocks} blocks"
        self.refuse_if(not 0 <= ahead < blocks, "nextn_predict_layers", expected)
        return blocks - ahead

    def per_layer(self, suffix: str, *default: int) -> list[int]:
        """A whole number for each layer; stored once, it is that of every layer."""
        value = self.key(suffix, *default)
        if not isinstance(value, np.ndarray | list):
            return [self.integer(suffix, *default)] * self.layers
        wrong = len(value) != self.integer("block_count")
        self.refuse_if(wrong, suffix, "a value for each layer")
        return [int(x) for x in value[: self.layers]]

    def values_per_layer(self, suffix: str, *default: float) -> list[Any]:
        """As :meth:`per_layer`, of numbers of any kind; a file may have more values than layers."""
        return self.for_each_layer(f"{self.architecture}.{suffix}", self.key(suffix, *default))

    def for_each_layer(self, key: str, value: Any) -> list[Any]:
        """The value of a key for each layer; stored once, it is that of every layer."""
        many = isinstance(value, np.ndarray | list)
        values = np.asarray(value).tolist() if many else [value] * self.layers
        if None in values or len(values) < self.layers:
            raise self.gguf.error(key, expected=f"{self.layers} values")
        return list(values[: self.layers])

    # ---------------------------------------------------------------------------- refusals

    def error(self, suffix: str, expected: str, found: str | None = None) -> GGUFError:
        """An error about a key; ``found`` defaults to its value."""
        return self.gguf.key_error(suffix, expected=expected, found=found)

    def refuse_if(
        self, condition: object, suffix: str, expected: str, found: str | None = None
    ) -> None:
        if condition:
            raise self.error(suffix, expected, found)

    def only(self, suffix: str, *allowed: object, absent: object = None) -> None:
        """Allow only some values of a key; ``absent`` is the meaning of none (the first)."""
        value = self.key(suffix, allowed[0] if absent is None else absent)
        wrong = isinstance(value, np.ndarray | list) or value not in allowed
        expected = f"{' or '.join(map(str, allowed))} in this architecture"
        self.refuse_if(wrong, suffix, expected)

    def tied(self) -> None:
        """Only the embedding as output head."""
        if "output.weight" in self:
            raise self.tensor("output.weight").error(
                expected="the embeddings as output head in this architecture", found="another one"
            )

    def whole_heads(self) -> None:
        """Heads must have the width hidden size / heads."""
        width = self["hidden_size"] // self["num_attention_heads"]
        expected = f"{width}, the hidden size over the heads"
        self.refuse_if(self["head_dim"] != width, "attention.key_length", expected)

    def one_base(self) -> None:
        """Windowed layers must have the RoPE base of all layers."""
        base = self["rope_theta"]
        expected = f"{base:g}, that of all layers, in this architecture"
        other = self.number("rope.freq_base_swa", base) != base
        self.refuse_if(other, "rope.freq_base_swa", expected)

    def unscaled(self, *known: str) -> None:
        """No RoPE scaling but of the ``known`` types."""
        kind = (self.config.get("rope_scaling") or {}).get("type", "none")
        expected = f"{' or '.join(('none', *known))} in this architecture"
        self.refuse_if(kind not in ("none", *known), "rope.scaling.type", expected, kind)

    def plain_rope(self, expected: str = "none in this architecture") -> None:
        """No RoPE scaling at all."""
        self.refuse_if(bool(self.config.get("rope_scaling")), "rope.scaling.type", expected)

    def text_rope(self, *, interleaved: bool) -> Config:
        """Refuse sections of a multimodal RoPE (time, height, width) that change RoPE on text.

        Text has one position for all three. Interleaved sections take turns; where a pair's section
        has ended already, as for two pairs of Qwen 3 VL, llama.cpp does not rotate it, and models
        do. Such pairs are among the slowest and hardly rotate if the base is as large as in those
        models.

        Returns:
            No keys.
        """
        suffix = "rope.dimension_sections"
        if self.key(suffix, None) is None:
            return {}
        given = np.atleast_1d(self.key(suffix))
        self.refuse_if(given.dtype.kind not in "iu", suffix, "whole numbers")
        sections = [int(x) for x in given] + [0] * (3 - len(given))
        pairs = round(self["head_dim"] * self["partial_rotary_factor"]) // 2
        self.refuse_if(
            any(sections[3:]) or (interleaved and sum(sections) != pairs),
            suffix,
            f"three sections for the {pairs} pairs that rotate",
            str(sections),
        )
        ended = interleaved and any(i >= 3 * sections[i % 3] for i in range(pairs))
        expected = f"at least {_LARGE_BASE:g} with sections {sections}"
        self.refuse_if(ended and self["rope_theta"] < _LARGE_BASE, "rope.freq_base", expected)
        return {}

    # ---------------------------------------------------------------------------- sections

    def local_base(self, *default: float) -> float:
        """The RoPE base of windowed layers; by default that of all layers."""
        return self.number("rope.freq_base_swa", *(default or (self["rope_theta"],)))

    def windows(self, every: int, *, full_first: bool = False, needed: bool = False) -> Config:
        """Sliding windows: by the file's own pattern, else in all but one of ``every`` layers.

        Args:
            full_first: full attention is in the first layer of each ``every``, not in the last.
            needed: refuse a file without them.
        """
        pattern_key = "attention.sliding_window_pattern"
        if not np.any(self.key("attention.sliding_window", None)):
            self.refuse_if(needed, "attention.sliding_window", "a sliding window")
            return {}
        pattern = self.key(pattern_key, every)
        if isinstance(pattern, np.ndarray | list):
            sliding = [bool(x) for x in pattern][: self.layers]
        else:
            every = self.integer(pattern_key, every)
            full = 0 if full_first else every - 1
            sliding = [every > 0 and i % every != full for i in range(self.layers)]
        window = self.integer("attention.sliding_window")
        short = needed and len(sliding) != self.layers
        self.refuse_if(short, pattern_key, "a value for each layer")
        return {
            "sliding_window": window,
            "sliding_window_pattern": every,
            "layer_types": ["sliding_attention" if x else "full_attention" for x in sliding],
        }

    def needs_experts(self) -> None:
        self.refuse_if("num_experts" not in self.config, "expert_count", "experts")

    def experts(self) -> Config:
        """Number and width of the experts, under the keys of all families."""
        count, used = self.integer("expert_count"), self.integer("expert_used_count")
        self.refuse_if(not 0 < used <= count, "expert_used_count", f"between 1 and {count}")
        size = self.integer("expert_feed_forward_length", self["intermediate_size"])
        return {
            "num_experts": count,
            "num_local_experts": count,
            "num_experts_per_tok": used,
            "moe_intermediate_size": size,
        }

    def gating(self, default: int = 1) -> str:
        """The function from router logits to weights."""
        number = self.integer("expert_gating_func", default) or default
        expected = "1 (softmax) or 2 (sigmoid)"
        self.refuse_if(number not in (1, 2), "expert_gating_func", expected)
        return "sigmoid" if number == 2 else "softmax"

    @property
    def dense_layers(self) -> int:
        """Layers before the first one with experts."""
        return self.integer("leading_dense_block_count", 0)

    @property
    def routed_scale(self) -> float:
        """The factor on the weights of experts."""
        return self.number("expert_weights_scale", 0.0) or 1.0

    @property
    def groups(self) -> Config:
        """Groups of experts."""
        return {
            "n_group": self.integer("expert_group_count", 1) or 1,
            "topk_group": self.integer("expert_group_used_count", 1) or 1,
        }

    def routed(self) -> Config:
        """Routing under DeepSeek's keys."""
        self.needs_experts()
        return {
            "n_routed_experts": self["num_experts"],
            "n_shared_experts": self.integer("expert_shared_count", 0),
            **self.groups,
            "first_k_dense_replace": self.dense_layers,
            "routed_scaling_factor": self.routed_scale,
            "norm_topk_prob": bool(self.key("expert_weights_norm", False)),
            "scoring_func": self.gating(),
            "topk_method": "noaux_tc" if self.gating() == "sigmoid" else "greedy",
            "moe_layer_freq": 1,
        }

    @property
    def router_bias(self) -> GGUFTensor | None:
        """The first layer's bias on the selection of experts."""
        return next((tensor for tensor in self.gguf.tensors if "exp_probs_b" in tensor.name), None)

    def no_router_bias(self) -> None:
        found = self.router_bias
        if found is not None:
            raise found.error(expected="no bias on the selection of experts", found="one")

    @property
    def shared_width(self) -> int:
        """Width of all shared experts together; 0 for none."""
        names = (f"blk.{i}.ffn_down_shexp.weight" for i in range(self.layers))
        return next((self.tensor(name).shape[-1] for name in names if name in self), 0)

    @property
    def shared_count(self) -> int:
        """Number of shared experts, each as wide as the routed ones."""
        each, width = int(self["moe_intermediate_size"]), self.shared_width
        self.refuse_if(
            each < 1 or width % each,
            "expert_shared_feed_forward_length",
            f"a multiple of {each} in this architecture",
            str(width),
        )
        return width // each


# The least that makes no measurable difference (as for _LARGEST_EPSILON).
_LARGE_BASE = 1e6
