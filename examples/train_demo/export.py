"""Write a training run as a GGUF file: `python -m examples.train_demo.export build/demo demo.gguf`.

The file is what llama.cpp's converter writes for a llama model with a byte-level BPE vocabulary:
matrices in Q8_0, norms in float32, the rows of q and k in the order of interleaved rotary
embeddings, tied embeddings.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np

from .corpus import CHAT_TEMPLATE, END_OF_TEXT, IM_END
from .model import Config

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
DESCRIPTION = (
    "A tiny demonstration model: it chats about the few things that it was trained on, and says so."
)
# At 0.8 it is "fine, thank you" in 4 of 60 replies to "What are you?", and at 0.2 in 17 of 100 to
# "What are you"; at 0.05 in none of 100 to either, and stories still differ.
TEMPERATURE = 0.05


def gguf_name(name: str) -> str:
    """`layers.0.mlp.up_proj.weight` -> `blk.0.ffn_up.weight`."""
    if name.startswith("layers."):
        _, index, rest = name.split(".", 2)
        return f"blk.{index}.{LAYER_NAMES[rest.removesuffix('.weight')]}.weight"
    return {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}[name]


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k from split halves, (heads, 2, D/2), to neighbouring pairs, (heads, D/2, 2)."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def add_metadata(writer: gguf.GGUFWriter, config: Config, name: str, parameters: int) -> None:
    writer.add_type("model")
    writer.add_name(name)
    writer.add_description(DESCRIPTION)
    writer.add_license("MIT")
    writer.add_languages(["en"])
    writer.add_size_label(f"{parameters / 1e6:.1f}M")
    writer.add_sampling_temp(TEMPERATURE)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.layers)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.hidden)
    writer.add_feed_forward_length(config.feed_forward)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocabulary)


def add_tokenizer(writer: gguf.GGUFWriter, path: Path) -> None:
    """The vocabulary of a `tokenizer.json`: pieces in id order, their types, and the merges."""
    data = json.loads(path.read_text())
    pieces = sorted(data["model"]["vocab"], key=data["model"]["vocab"].__getitem__)
    special = {token["content"] for token in data["added_tokens"] if token["special"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(pieces)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if piece in special else gguf.TokenType.NORMAL for piece in pieces]
    )
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in data["model"]["merges"]]
    )
    writer.add_bos_token_id(pieces.index(END_OF_TEXT))
    writer.add_eos_token_id(pieces.index(IM_END))
    writer.add_eot_token_id(pieces.index(IM_END))
    writer.add_pad_token_id(pieces.index(END_OF_TEXT))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def add_tensors(writer: gguf.GGUFWriter, weights: dict[str, np.ndarray], config: Config) -> None:
    for name, weight in weights.items():
        if name.endswith("q_proj.weight"):
            weight = interleave(weight, config.heads)
        elif name.endswith("k_proj.weight"):
            weight = interleave(weight, config.kv_heads)
        if weight.ndim == 1:
            writer.add_tensor(gguf_name(name), weight)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(weight, kind), raw_dtype=kind)


def export(run: Path, target: Path, name: str) -> None:
    """Write the last checkpoint of the run in `run` to `target`."""
    config = Config(**json.loads((run / "config.json").read_text()))
    state = mx.load(str(run / "checkpoint.safetensors"))
    weights = {
        key.removeprefix("model."): np.array(value, np.float32)
        for key, value in state.items()
        if key.startswith("model.")
    }
    writer = gguf.GGUFWriter(target, "llama")
    add_metadata(writer, config, name, sum(weight.size for weight in weights.values()))
    add_tokenizer(writer, run / "tokenizer.json")
    add_tensors(writer, weights, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="directory that train.py wrote")
    parser.add_argument("target", type=Path, help="the GGUF file to write")
    parser.add_argument("--name", default="mlxrun demo")
    args = parser.parse_args()
    export(args.run, args.target, args.name)
    print(f"{args.target}: {args.target.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
