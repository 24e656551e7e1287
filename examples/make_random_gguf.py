"""Write a GGUF of a real model's shape with random weights, to time conversion and loading.

    python examples/make_random_gguf.py tinyllama /tmp/tinyllama.gguf
    python examples/make_random_gguf.py deep /tmp/deep.gguf --type F32

Without ``--type``, types are mixed as in llama-quantize's Q4_K_M: Q6_K for the output head, for
half of the layers' values and down projections, Q4_K for the rest. The vocabulary is made up.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import gguf
import numpy as np

Kind = gguf.GGMLQuantizationType


@dataclass(frozen=True)
class Shape:
    """What decides a llama's size."""

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    vocab: int
    context: int = 2048


SHAPES = {
    "tinyllama": Shape(22, 2048, 5632, 32, 4, 32000),
    "qwen2-1.5b": Shape(28, 1536, 8960, 12, 2, 151936),
    "llama3-8b": Shape(32, 4096, 14336, 32, 8, 128256),
    "hundred": Shape(12, 768, 2048, 12, 12, 32000),  # 134 million weights
    "deep": Shape(28, 64, 192, 4, 2, 2000),  # where building graphs is what takes time
    "six": Shape(6, 256, 768, 8, 4, 2000),
    "small": Shape(6, 512, 1536, 8, 4, 4096),
    "long": Shape(2, 256, 512, 4, 2, 512, context=1 << 16),
}


# Of most matrices, and of those that llama-quantize keeps finer.
Q4_K_M = (Kind.Q4_K, Kind.Q6_K)

# Where a block keeps its float16 scales (the first one of its codes, a second one of minimums), in
# bytes, and what its codes are multiplied by besides.
SCALES = {
    Kind.Q4_0: ((0,), 1),
    Kind.Q8_0: ((0,), 16),
    Kind.Q4_K: ((0, 2), 32),
    Kind.Q5_K: ((0, 2), 64),
    Kind.Q6_K: ((208,), 128),
    Kind.IQ4_XS: ((0,), 512),
}


def blocks(rng: np.random.Generator, kind: Kind, rows: int, columns: int) -> np.ndarray:
    """Random blocks, or floats, whose weights have the size of a trained model's.

    Raises:
        ValueError: rows are no whole number of blocks.
    """
    size = 1.0 / np.sqrt(columns)
    if kind in (Kind.F16, Kind.BF16, Kind.F32):
        floats = rng.standard_normal((rows, columns), np.float32) * np.float32(size)
        return gguf.quants.quantize(floats, kind)
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    if columns % elements:
        raise ValueError(
            f"rows of {columns} are no whole number of {kind.name} blocks of {elements}"
        )
    raw = rng.integers(0, 256, (rows, columns // elements, nbytes), dtype=np.uint8)
    if kind is Kind.MXFP4:
        raw[..., 0] = 127 + round(np.log2(size / 3))
        return raw.reshape(rows, -1)
    places, by = SCALES[kind]
    for i, place in enumerate(places):
        scale = size / (8 * by) * 8**i
        raw[..., place : place + 2] = np.array([scale], np.float16).view(np.uint8)
    return raw.reshape(rows, -1)


def write(shape: Shape, path: str, seed: int = 0, kinds: tuple[Kind, Kind] = Q4_K_M) -> None:
    """Write the file.

    Args:
        kinds: what most matrices are stored as, and the finer type of some of them.
    """
    most, finest = kinds
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("random weights")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    _add_vocabulary(writer, shape.vocab)

    def matrix(name: str, rows: int, columns: int, kind: Kind = most) -> None:
        writer.add_tensor(f"{name}.weight", blocks(rng, kind, rows, columns), raw_dtype=kind)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(shape.hidden, np.float32))

    width = shape.hidden // shape.heads * shape.kv_heads
    matrix("token_embd", shape.vocab, shape.hidden)
    norm("output_norm")
    matrix("output", shape.vocab, shape.hidden, finest)
    for i in range(shape.layers):
        finer = finest if i % 2 == 0 else most
        norm(f"blk.{i}.attn_norm")
        norm(f"blk.{i}.ffn_norm")
        matrix(f"blk.{i}.attn_q", shape.hidden, shape.hidden)
        matrix(f"blk.{i}.attn_k", width, shape.hidden)
        matrix(f"blk.{i}.attn_v", width, shape.hidden, finer)
        matrix(f"blk.{i}.attn_output", shape.hidden, shape.hidden)
        matrix(f"blk.{i}.ffn_gate", shape.feed_forward, shape.hidden)
        matrix(f"blk.{i}.ffn_up", shape.feed_forward, shape.hidden)
        matrix(f"blk.{i}.ffn_down", shape.hidden, shape.feed_forward, finer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """An SPM vocabulary: three control tokens, the bytes, and numbered words."""
    control, byte, normal = 3, 6, 1
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    kinds = [2, control, control, *([byte] * 256)]
    words = [f"▁w{i}" for i in range(size - len(tokens))]
    kinds += [normal] * len(words)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens + words)
    writer.add_token_scores([-float(i) for i in range(size)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out")
    parser.add_argument("--seed", type=int, default=0)
    types = [kind.name for kind in (Kind.F32, Kind.F16, Kind.BF16, *SCALES)]
    parser.add_argument("--type", choices=types, help="of all matrices")
    arguments = parser.parse_args()
    chosen = arguments.type and (Kind[arguments.type],) * 2
    try:
        write(SHAPES[arguments.shape], arguments.out, arguments.seed, chosen or Q4_K_M)
    except ValueError as error:
        parser.error(f"{error}: choose another --type, F32 fits every shape")
