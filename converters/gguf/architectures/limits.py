"""What model classes of mlx-lm do not have: a file that needs it is refused, not run without it."""

from __future__ import annotations

import numpy as np

from converters.gguf.architectures.row import Config
from converters.gguf.numbers import float_of, layer_count, scalar
from converters.gguf.reader import GGUFFile


def no_windows(gguf: GGUFFile) -> None:
    """Refuse sliding windows.

    Raises:
        GGUFError: the file has them.
    """
    if scalar(gguf, "attention.sliding_window", 0):
        key = f"{gguf.architecture}.attention.sliding_window"
        raise gguf.error(key, expected="no sliding window in this architecture")


def tied(gguf: GGUFFile) -> None:
    """Refuse an output head of the file's own.

    Raises:
        GGUFError: it has one.
    """
    if "output.weight" in gguf:
        raise gguf.tensor("output.weight").error(
            expected="the embeddings as output head in this architecture", found="another one"
        )


def whole_heads(gguf: GGUFFile, config: Config) -> None:
    """Require heads that share the hidden size.

    Raises:
        GGUFError: they are of another width.
    """
    width = config["hidden_size"] // config["num_attention_heads"]
    if config["head_dim"] != width:
        key = f"{gguf.architecture}.attention.key_length"
        raise gguf.error(key, expected=f"{width}, the hidden size over the heads")


# The least beside which unturned pairs make no difference that is found (as below).
_LARGE_BASE = 1e6


def text_alone(gguf: GGUFFile, config: Config, *, interleaved: bool) -> None:
    """Refuse sections of a rotation by time, height and width that matter to text, too.

    To text all three are one position. A pair turns by the section that is its turn; where that is
    over already, as for two pairs of Qwen 3 VL's, llama.cpp leaves it unturned and models do not.
    Such pairs are among the slowest, which hardly turn where the base is as large as those models'.

    Args:
        interleaved: pairs are of the three in turns, as far as their sections go.

    Raises:
        GGUFError: there are fewer or more places in sections than pairs, or pairs in none that
            turn fast enough to matter.
    """
    if gguf.key("rope.dimension_sections", None) is None:
        return
    given = np.atleast_1d(gguf.key("rope.dimension_sections"))
    if given.dtype.kind not in "iu":
        raise gguf.error(f"{gguf.architecture}.rope.dimension_sections", expected="whole numbers")
    sections = [int(x) for x in given] + [0] * (3 - len(given))
    pairs = round(config["head_dim"] * config["partial_rotary_factor"]) // 2
    if any(sections[3:]) or (interleaved and sum(sections) != pairs):
        raise gguf.error(
            f"{gguf.architecture}.rope.dimension_sections",
            expected=f"three sections for the {pairs} pairs that turn",
            found=str(sections),
        )
    left = interleaved and any(i >= 3 * sections[i % 3] for i in range(pairs))
    if left and config["rope_theta"] < _LARGE_BASE:
        key = f"{gguf.architecture}.rope.freq_base"
        raise gguf.error(key, expected=f"at least {_LARGE_BASE:g} beside sections {sections}")


def needs_experts(gguf: GGUFFile, config: Config) -> None:
    """Require experts.

    Raises:
        GGUFError: the file has none.
    """
    if "num_experts" not in config:
        raise gguf.error(f"{gguf.architecture}.expert_count", expected="experts")


# Of the weight of a single expert, which normalising makes one, these make nothing at all.
_FOR_SEVERAL = (
    "afmoe", "bailing_hybrid", "bailing_moe", "deepseek_v32", "exaone_moe", "glm_moe_dsa",
    "kimi_linear", "mimo_v2_flash", "nemotron_h",
)  # fmt: skip


def several_experts(gguf: GGUFFile, config: Config) -> None:
    """Require that tokens go through several experts where the model's class is made for that.

    Raises:
        GGUFError: they go through one.
    """
    if config["model_type"] in _FOR_SEVERAL and config.get("num_experts_per_tok") == 1:
        key = f"{gguf.architecture}.expert_used_count"
        raise gguf.error(key, expected="at least 2 in this architecture")


# Some of whose norms have an epsilon of their class's own, and the largest beside which that makes
# no difference that is found (the square of logits' differences below 1e-8 of theirs).
_EPSILON_OF_ITS_OWN = (
    "bailing_hybrid", "deepseek_v32", "glm_moe_dsa", "kimi_linear", "llama4", "mamba2", "mistral4",
    "plamo2", "qwen3_5", "qwen3_5_moe", "qwen3_next",
)  # fmt: skip
_LARGEST_EPSILON = 2e-5


def small_epsilon(gguf: GGUFFile, config: Config) -> None:
    """Refuse an epsilon that matters where the model's class does not take it everywhere.

    Raises:
        GGUFError: it is larger than usual.
    """
    epsilon = config.get("rms_norm_eps", 0.0)
    if config["model_type"] in _EPSILON_OF_ITS_OWN and epsilon > _LARGEST_EPSILON:
        key = f"{gguf.architecture}.attention.layer_norm_rms_epsilon"
        raise gguf.error(key, expected=f"at most {_LARGEST_EPSILON:g} in this architecture")


def one_base(gguf: GGUFFile, config: Config) -> None:
    """Refuse another base of rotation in layers with a window.

    Raises:
        GGUFError: they have one.
    """
    base = config["rope_theta"]
    if float_of(gguf, "rope.freq_base_swa", base) != base:
        key = f"{gguf.architecture}.rope.freq_base_swa"
        raise gguf.error(key, expected=f"{base:g}, that of all layers, in this architecture")


def needs_windows(gguf: GGUFFile, found: Config) -> Config:
    """What was found of sliding windows, of which there must be some.

    Raises:
        GGUFError: there are none, or not one for each layer.
    """
    key = f"{gguf.architecture}.attention.sliding_window"
    if not found:
        raise gguf.error(key, expected="a sliding window")
    if len(found["layer_types"]) != layer_count(gguf):
        raise gguf.error(f"{key}_pattern", expected="a value for each layer")
    return found
