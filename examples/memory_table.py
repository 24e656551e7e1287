"""The memory plan against MLX's measurements: predicted and measured peaks, cell by cell.

    python -m examples.memory_table                 # models of six kinds, made here: some minutes
    python -m examples.memory_table model.gguf --contexts 1024,4096 --parallel 1,4 --types f32,q8:q4

A cell is a model, a context, a number of sequences and a type of cache. All sequences are alive at
once: each prefills a prompt, in the chunks of an offline batch, then decodes until the context is
full. The peak is MLX's, from the first token of a prompt to the last sampled one; the model is
loaded before.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import mlxrun  # first: it finds a BLAS for MLX

import mlx.core as mx  # isort: skip

from mlxrun.config import CacheConfig
from mlxrun.engine.engine import prefill_budget
from mlxrun.loader import open_model
from mlxrun.memory.plan import plan_source

from .make_random_gguf import SHAPES, write

DEMO = Path(mlxrun.__file__).parent / "assets" / "demo.gguf"
LEAST = 8  # tokens that a sequence samples
_COMMON: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "vocab_size": 4096,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
#: Kinds that differ in cache and computation: windows and soft caps, sinks and experts,
#: latents, states.
KINDS: dict[str, dict[str, Any]] = {
    "gemma2": {
        **_COMMON, "model_type": "gemma2", "sliding_window": 256, "query_pre_attn_scalar": 64,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    },
    "gpt_oss": {
        **_COMMON, "model_type": "gpt_oss", "sliding_window": 128, "num_local_experts": 8,
        "num_experts_per_tok": 2, "intermediate_size": 512, "tie_word_embeddings": False,
        "rope_theta": 10000.0, "layer_types": ["sliding_attention", "full_attention"] * 3,
        "rope_scaling": None,
    },
    "deepseek_v2": {
        **_COMMON, "model_type": "deepseek_v2", "num_key_value_heads": 8, "kv_lora_rank": 128,
        "q_lora_rank": None, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1,
        "moe_intermediate_size": 384, "first_k_dense_replace": 1, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "routed_scaling_factor": 1.0, "topk_method": "greedy",
        "rope_scaling": {
            "type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096,
            "mscale": 1.0, "mscale_all_dim": 1.0,
        },
    },
    "falcon_h1": {
        **_COMMON, "model_type": "falcon_h1", "mamba_d_ssm": 512, "mamba_d_state": 64,
        "mamba_d_head": 64, "mamba_n_heads": 8, "mamba_d_conv": 4, "rope_theta": 10000.0,
    },
}  # fmt: skip


class Cell(NamedTuple):
    """What is run: sequences of ``context`` tokens in ``parallel``, in types of keys and values."""

    context: int
    parallel: int
    cache: CacheConfig


def make(kind: str, folder: Path) -> Path:
    """A model of a kind with random weights, as a directory, with the demo's tokenizer."""
    from mlx.utils import tree_flatten
    from mlx_lm.utils import _get_classes

    config = KINDS[kind]
    path = folder / kind
    mlxrun.convert(DEMO, path)
    for file in path.glob("*.safetensors*"):
        file.unlink()
    made, arguments = _get_classes(dict(config))
    mx.random.seed(0)
    weights = dict(tree_flatten(made(arguments.from_dict(dict(config))).parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


def measure(llm: mlxrun.LLM, cell: Cell) -> tuple[int, int]:
    """The peak in bytes with all sequences of a cell alive, and the length of their prompts.

    Memory of other models is left out.
    """
    budget = prefill_budget("batch")
    # The first must still decode when the prompt of the last is prefilled.
    sampled = LEAST
    if cell.parallel > 1:
        sampled += cell.context * cell.parallel // (budget + cell.parallel)
    prompt = cell.context - sampled
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 250, (cell.parallel, prompt)).tolist()
    llm.prefix_cache.budget = 0  # prefixes of one cell would count for the next
    gc.collect()
    mx.clear_cache()
    # Mapped weights count for the model, though they are not MLX's memory.
    others = mx.get_active_memory() - llm.model.nbytes
    mx.reset_peak_memory()
    types = dict(zip(("cache_type_k", "cache_type_v"), cell.cache.types, strict=True))
    if cell.parallel == 1:
        llm.generate(ids[0], max_tokens=sampled, ignore_eos=True, **types)
        return mx.get_peak_memory() - others, prompt
    llm.batch(
        ids,
        max_tokens=sampled,
        ignore_eos=True,
        parallel=cell.parallel,
        progress=False,
        **types,
    )
    return mx.get_peak_memory() - others, prompt


def predict(path: Path, cell: Cell, prompt: int) -> int:
    """The plan's peak in bytes, from the headers of a model's files."""
    budget = prefill_budget("batch")
    source = open_model(path)
    plan = plan_source(source, source.storage(), cache=cell.cache, prefill_tokens=budget)
    return plan.terms(cell.context, cell.parallel, prompt=prompt).peak


def rows(name: str, path: Path, cells: Sequence[Cell]) -> Iterator[tuple[str, Cell, int, int]]:
    """Each cell with its predicted and its measured peak, in bytes."""
    llm = mlxrun.load(path)
    for cell in cells:
        measured, prompt = measure(llm, cell)
        yield name, cell, predict(path, cell, prompt), measured


def line(name: str, cell: Cell, predicted: int, measured: int) -> str:
    """A row of the table."""
    types = ":".join(name or "plain" for name in cell.cache.types)
    return (
        f"| {name} | {cell.context} | {cell.parallel} | {types} | {predicted / 1e6:.1f} | "
        f"{measured / 1e6:.1f} | {predicted / measured - 1:+.1%} |"
    )


def cells_of(contexts: str, parallel: str, types: str) -> list[Cell]:
    """All combinations of lists as the command line has them."""
    caches: list[CacheConfig] = []
    for each in types.split(","):
        keys, _, values = (None, "", None) if each == "plain" else each.partition(":")
        caches.append(CacheConfig(cache_type_k=keys, cache_type_v=values or keys))
    return [
        Cell(int(context), int(count), cache)
        for context in contexts.split(",")
        for count in parallel.split(",")
        for cache in caches
    ]


def usual(folder: Path) -> Iterator[tuple[str, Path, list[Cell]]]:
    """The models and cells of the table in ``docs/memory.md``."""
    small = folder / "small.gguf"
    write(SHAPES["small"], str(small))
    yield "demo", DEMO, cells_of("500,1000", "1,4,8", "plain")
    yield "demo", DEMO, cells_of("1000", "1,4", "q8:q4")
    yield "llama", small, cells_of("300,1000,2000", "1,4", "plain")
    yield "llama", small, cells_of("2000", "1", "q8:q4,f16,q4,q4c:q8")
    yield "llama", small, cells_of("1000", "8", "plain,q8")
    yield "llama", small, cells_of("1000", "4", "q4c:q8")
    for kind in KINDS:
        joint = "1,4" if kind != "falcon_h1" else "1"
        yield kind, make(kind, folder), cells_of("500,1500", joint, "plain")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--contexts", default="1000")
    parser.add_argument("--parallel", default="1,4")
    parser.add_argument("--types", default="plain", help="as keys:values, or one name for both")
    args = parser.parse_args()
    print("| model | context | sequences | keys:values | predicted MB | measured MB | off by |")
    print("|---|---|---|---|---|---|---|")
    off = []
    with tempfile.TemporaryDirectory() as folder:
        cells = cells_of(args.contexts, args.parallel, args.types)
        chosen = [(path.stem, path, cells) for path in args.models] or usual(Path(folder))
        for name, path, own in chosen:
            for row in rows(name, path, own):
                print(line(*row), flush=True)
                off.append(row[2] / row[3] - 1)
    print(f"\n{len(off)} cells, off by {min(off):+.1%} to {max(off):+.1%}")


if __name__ == "__main__":
    main()
