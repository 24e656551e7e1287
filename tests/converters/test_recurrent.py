"""Files of recurrent and hybrid architectures: what is put in order, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from conformance import skeleton as skeletons
from conformance.measure import SAME
from conformance.skeleton import Skeleton, read
from gguf.quants import dequantize, quantize
from tiny_models import nmse

from converters.convert import stream
from converters.errors import GGUFError
from converters.gguf.reader import read_gguf
from converters.gguf.source import gguf_tensors, open_gguf
from converters.quantize.policy import Policy
from mlxrun import convert

Q8_0 = gguf.GGMLQuantizationType.Q8_0


@pytest.fixture
def pack(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have skeletons written with some of their matrices as Q8_0."""
    plain = gguf.GGUFWriter.add_tensor

    def packing(pattern: str) -> None:
        def add(self: gguf.GGUFWriter, name: str, tensor: np.ndarray) -> None:
            if fnmatchcase(name, pattern):
                plain(self, name, quantize(tensor, Q8_0), raw_dtype=Q8_0)
            else:
                plain(self, name, tensor)

        monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", add)

    return packing


def with_heads_of(width: int) -> Skeleton:
    """Qwen 3.5 with 2 heads of keys and 6 of values, all of one width."""
    model = read("qwen35-9b")
    keys, values = 2 * width, 6 * width
    shapes = {
        "attn_qkv.weight": [2 * keys + values, 64],
        "attn_gate.weight": [values, 64],
        "ssm_conv1d.weight": [2 * keys + values, 4],
        "ssm_norm.weight": [width],
        "ssm_out.weight": [64, values],
    }
    return replace(
        model,
        keys={**model.keys, "ssm.state_size": width, "ssm.inner_size": values},
        tensors={
            name: shapes.get(name.split(".", 2)[-1], shape) for name, shape in model.tensors.items()
        },
    )


def converted(path: Path, target: str) -> np.ndarray:
    """One parameter of a file, expanded."""
    file = read_gguf(path)
    for made in stream(gguf_tensors(open_gguf(file).names, Policy("near", "float32"))):
        if made.target == target:
            arrays = {name: mx.array(np.ascontiguousarray(a)) for name, a in made.arrays.items()}
            assert made.layout.quantized
            config = made.layout.module_config
            expanded = mx.dequantize(
                arrays["weight"], arrays["scales"], arrays.get("biases"), **config
            )
            return np.array(expanded)
    raise AssertionError(f"no {target}")


def in_turns(values: np.ndarray, axis: int, width: int) -> np.ndarray:
    """Six heads of values that two keys take in turns, those of one key after the other."""
    parts = np.split(values, values.shape[axis] // width, axis)
    return np.concatenate([parts[turn * 2 + key] for key in range(2) for turn in range(3)], axis)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("mamba2-130m", "float32"), ("qwen35-9b", "float32"), ("jamba-3b", "float16")],
)
def test_rates_of_heads_stay_in_float32(tmp_path: Path, name: str, dtype: str) -> None:
    file = read_gguf(read(name).write(tmp_path / "x.gguf"))
    made = stream(gguf_tensors(open_gguf(file).names, Policy("near", "float16")))
    rates = [one.layout.dtype for one in made if one.target.endswith("A_log")]
    assert set(rates) == {dtype}


def test_blocks_of_packed_columns_change_places(
    tmp_path: Path, pack: Callable[[str], None]
) -> None:
    pack("blk.0.ssm_out.weight")
    model = with_heads_of(32)
    path = model.write(tmp_path / "x.gguf")
    stored = model.value("blk.0.ssm_out.weight", "F32", (64, 192))
    kept = dequantize(quantize(stored, Q8_0), Q8_0)
    found = converted(path, "language_model.model.layers.0.linear_attn.out_proj.weight")
    np.testing.assert_allclose(found, in_turns(kept, 1, 32), atol=1e-6)


def test_packed_rows_of_values_change_places(tmp_path: Path, pack: Callable[[str], None]) -> None:
    pack("blk.0.attn_qkv.weight")
    model = with_heads_of(16)
    path = model.write(tmp_path / "x.gguf")
    stored = model.value("blk.0.attn_qkv.weight", "F32", (160, 64))
    kept = dequantize(quantize(stored, Q8_0), Q8_0)
    expected = np.concatenate([kept[:64], in_turns(kept[64:], 0, 16)])
    found = converted(path, "language_model.model.layers.0.linear_attn.in_proj_qkv.weight")
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_columns_that_share_a_scale_cannot_be_parted(
    tmp_path: Path, pack: Callable[[str], None]
) -> None:
    pack("blk.0.ssm_out.weight")
    path = with_heads_of(16).write(tmp_path / "x.gguf")
    with pytest.raises(GGUFError, match="share no scale"):
        converted(path, "language_model.model.layers.0.linear_attn.out_proj.weight")


def test_rows_of_a_fused_matrix_go_to_their_keys(
    tmp_path: Path, pack: Callable[[str], None]
) -> None:
    """Old files of Qwen 3 Next: queries, keys, values and gates of a key are neighbors."""
    pack("blk.0.ssm_in.weight")
    model = replace(read("qwen3next-legacy"))
    model = replace(
        model,
        keys={**model.keys, "embedding_length": 64},
        tensors={
            name: [64 if size == 48 else size for size in shape]
            for name, shape in model.tensors.items()
        },
    )
    path = model.write(tmp_path / "x.gguf")
    stored = model.value("blk.0.ssm_in.weight", "F32", (192, 64))
    kept = dequantize(quantize(stored, Q8_0), Q8_0).reshape(2, 96, 64)  # keys, rows, columns
    query, key, value, gate = np.split(kept, [12, 24, 60], axis=1)
    layer = "language_model.model.layers.0.linear_attn"
    for name, expected in {
        "in_proj_qkv": np.concatenate([x.reshape(-1, 64) for x in (query, key, value)]),
        "in_proj_z": gate.reshape(-1, 64),
    }.items():
        np.testing.assert_allclose(converted(path, f"{layer}.{name}.weight"), expected, atol=1e-6)


#: One skeleton of each class of mlx-lm's that files of these architectures become.
STOCK = (
    "falcon-h1-normed", "gemma3n-e2b", "gemma4-e2b", "granitehybrid-tiny", "jamba-3b",
    "kimi-linear-48b", "lfm2-350m", "lfm2moe-8b", "ling3-tiny", "mamba-falcon", "mamba2-130m",
    "nemotron_h_moe-latent", "plamo2-1b", "qwen35-9b", "qwen35moe-35b", "qwen3next-legacy",
    "rwkv7-190m",
)  # fmt: skip


@pytest.mark.parametrize("name", STOCK)
def test_stock_mlx_lm_computes_llama_cpps_logits(tmp_path: Path, name: str) -> None:
    from mlx_lm.utils import load_model

    model = read(name)
    convert(model.write(tmp_path / "x.gguf"), tmp_path / "out", policy="exact")
    stock, _ = load_model(tmp_path / "out", lazy=False, strict=True)
    tokens = mx.array([model.token_ids()])
    logits = np.array(stock(tokens, cache=stock.make_cache())[0], np.float64)
    assert nmse(logits, skeletons.expected(model)) <= SAME


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("mamba-130m", {"attention.layer_norm_rms_epsilon": 1e-6}, "layer_norm_rms_epsilon"),
    ("mamba2-130m", {"ssm.group_count": 2}, "normalizes all groups together"),
    ("mamba2-130m", {"ssm.time_step_rank": 5}, "time_step_rank"),
    ("mamba2-130m", {"ssm.group_count": 4}, "group_count"),
    ("lfm2-350m", {"attention.sliding_window": 8}, "no sliding window"),
    ("lfm2-350m", {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, "rope.scaling"),
    ("lfm2-350m", {"attention.head_count_kv": [0, 2]}, "each of the 6 blocks"),
    ("lfm2moe-8b", {"expert_gating_func": 1}, "sigmoid"),
    ("falcon-h1-normed", {"ssm.group_count": 2}, "normalizes all groups together"),
    ("granitehybrid-turning", {"rope.dimension_count": 8}, "whole head"),
    ("jamba-3b", {"expert_count": 4, "expert_used_count": 2}, "weighs them"),
    ("nemotron_h-8b", {"feed_forward_length": [0, 112, 0, 0, 0, 96]}, "one size"),
    ("nemotron_h-8b", {"attention.head_count_kv": 0}, "layers with attention"),
    ("qwen35-9b", {"ssm.group_count": 4}, "multiple of the 4 heads of keys"),
    ("qwen35-9b", {"full_attention_interval": 9}, "between 1 and the 5 layers"),
    ("qwen35-9b", {"attention.recurrent_layers": [True, True, False, True, True]}, "each 4th"),
    ("gemma4-e2b", {"feed_forward_length": [64, 64, 64, 64, 64, 96, 96, 96]}, "doubled"),
    ("gemma4-26b", {"attention.head_count_kv": [2, 1, 2, 1]}, "one number for each kind"),
    ("gemma4-31b", {"rope.dimension_count_swa": 8}, "dimension_count_swa"),
    ("gemma4-31b", {"attention.sliding_window": 0}, "a sliding window"),
    ("gemma3n-e2b", {"altup.num_inputs": 3}, "num_inputs"),
    ("gemma3n-e2b", {"activation_sparsity_scale": [1.0, 2.0]}, "a value for each layer"),
    ("granitehybrid-350m", {"rope.scaling.finetuned": [1, 2]}, "true or false"),
    ("nemotron_h_moe-30b", {"expert_count": 0}, "experts"),
    ("qwen35-9b", {"ssm.state_size": 2147483648}, "make up 160 rows"),
    ("qwen3next-legacy", {"ssm.state_size": 2147483648}, "make up 192 rows"),
    ("kimi-linear-48b", {"attention.q_lora_rank": 8}, "whole queries"),
    ("kimi-linear-48b", {"attention.head_count_kv": [0, 0, 0, 0]}, "layers with attention"),
    ("ling3-tiny", {"swiglu_clamp_exp": [0.0, 7.0, 7.0, 7.0, 7.0]}, "no limits"),
    ("ling3-tiny", {"attention.head_count_kv": [0, 1, 0, 0, 1]}, "end of equal groups"),
    ("plamo2-1b", {"rope.freq_base": 1e6}, "freq_base"),
    ("plamo2-1b", {"attention.head_count_kv": [2, 0, 0, 2]}, "equal runs"),
    ("rwkv7-190m", {"wkv.head_size": 32}, "head_size"),
]


def refuse(path: Path) -> None:
    open_gguf(path)


@pytest.mark.parametrize(("name", "keys", "words"), REFUSED)
def test_what_a_class_would_compute_otherwise_is_refused(
    tmp_path: Path, name: str, keys: dict[str, Any], words: str
) -> None:
    model = read(name)
    path = replace(model, keys={**model.keys, **keys}).write(tmp_path / "x.gguf")
    with pytest.raises(GGUFError, match=words):
        refuse(path)


HEADS = [("lfm2-350m", True), ("gemma3n-e2b", True), ("nemotron_h-8b", False)]


@pytest.mark.parametrize(("name", "added"), HEADS)
def test_a_head_that_a_class_cannot_have_is_refused(tmp_path: Path, name: str, added: bool) -> None:
    """Some classes always use the embeddings again, some never do."""
    model = read(name)
    tensors = dict(model.tensors)
    if added:
        tensors["output.weight"] = tensors["token_embd.weight"]
    else:
        del tensors["output.weight"]
    path = replace(model, tensors=tensors).write(tmp_path / "x.gguf")
    with pytest.raises(GGUFError, match=r"output\.weight"):
        open_gguf(path)


def test_factors_that_are_no_part_of_a_head_are_refused(tmp_path: Path) -> None:
    model = read("gemma4-31b")
    values = {**model.values, "rope_freqs.weight": {"constant": 2}}
    path = replace(model, values=values).write(tmp_path / "x.gguf")
    with pytest.raises(GGUFError, match="ones and then 1e30"):
        open_gguf(path)


def test_the_first_layers_placeholders_are_left_out_with_a_reason(tmp_path: Path) -> None:
    file = read_gguf(read("rwkv7-190m").write(tmp_path / "x.gguf"))
    skipped = {tensor.name: reason for tensor, reason in open_gguf(file).names.skipped}
    assert set(skipped) == {f"blk.0.time_mix_v{i}.weight" for i in range(3)}
    assert all("uses it" in reason for reason in skipped.values())
