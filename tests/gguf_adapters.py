"""Random adapters in llama.cpp's format, and llama.cpp's logits with them.

usage: MLXRUN_LLAMA_PYTHON=python-with-llama-cpp python tests/gguf_adapters.py

makes ``tests/oracle/adapters.npz`` anew. Shares no code with the tested modules.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

TESTS = Path(__file__).resolve().parent
sys.path.append(str(TESTS))

from conformance.skeleton import Skeleton  # noqa: E402
from conformance.skeleton import read as read_skeleton  # noqa: E402

LOGITS = TESTS / "oracle" / "adapters.npz"
TOKENS = 24
Shape = tuple[int, ...]

ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
DENSE = (*ATTENTION, "attn_qkv", "ffn_gate", "ffn_up", "ffn_down")
EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
ENDS = ("token_embd", "output")


@dataclass(frozen=True)
class Case:
    """An adapter for a skeleton, and the strength it is applied with."""

    skeleton: str
    modules: tuple[str, ...] = DENSE
    rank: int = 3
    alpha: float = 6.0
    strength: float = 1.0


CASES = {
    "llama": Case("llama-factors", (*DENSE, *ENDS)),
    "llama-q-only": Case("llama-factors", ("attn_q",), rank=1, alpha=0.0, strength=-0.5),
    "llama-linear": Case("llama-linear", strength=0.3),
    "granite": Case("granite-plain"),
    "internlm2": Case("internlm2-gqa"),
    "qwen3": Case("qwen3-narrow", (*DENSE, *ENDS), rank=16),
    "gemma3": Case("gemma3-untied"),
    "phi3": Case("phi3-mha", (*DENSE, *ENDS), strength=2.0),
    "mixtral": Case("mixtral-2x", (*ATTENTION, *EXPERTS)),
    "qwen3moe": Case("qwen3moe-one", (*ATTENTION, *EXPERTS), strength=0.5),
    "gpt-oss": Case("gpt-oss-small", (*ATTENTION, *EXPERTS)),
}


def write(case: Case, folder: Path, *, seed: int = 0) -> tuple[Path, Path]:
    """The files of the model and of the adapter."""
    skeleton = read_skeleton(case.skeleton)
    base = skeleton.write(folder / f"{case.skeleton}.gguf")
    path = folder / f"adapter-{seed}.gguf"
    shapes = adapted(skeleton, case.modules)
    return base, write_adapter(
        path, skeleton.arch, shapes, rank=case.rank, alpha=case.alpha, seed=seed
    )


def adapted(skeleton: Skeleton, modules: Collection[str]) -> dict[str, Shape]:
    """Shapes of the model's matrices that are to be adapted, by tensor."""
    found = {}
    for name, (_, shape) in skeleton.shapes().items():
        module, _, kind = name.split(".", 2)[-1].rpartition(".")
        if kind == "weight" and module in modules and len(shape) > 1:
            found[name] = shape
    return found


def factors(name: str, shape: Shape, rank: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Seeded ``a`` (..., rank, columns) and ``b`` (..., rows, rank) for a tensor."""
    *stack, rows, columns = shape
    rng = np.random.default_rng([seed, *name.encode()])
    a = rng.standard_normal((*stack, rank, columns)) / np.sqrt(columns)
    b = 0.3 * rng.standard_normal((*stack, rows, rank))
    return a.astype(np.float32), b.astype(np.float32)


def write_adapter(
    path: Path,
    arch: str,
    shapes: dict[str, Shape],
    *,
    rank: int = 3,
    alpha: float = 6.0,
    kind: str = "F32",
    expand: bool = False,
    seed: int = 0,
) -> Path:
    """An adapter as llama.cpp's converter stores it; matrices of embeddings change places.

    ``expand``: store the blocks of ``kind`` dequantized to float32.
    """
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    stored = gguf.GGMLQuantizationType[kind]
    for name, shape in shapes.items():
        a, b = factors(name, shape, rank, seed)
        if name == "token_embd.weight":
            a, b = b, np.ascontiguousarray(a.T)
        for part, array in (("a", a), ("b", b)):
            data, own = gguf.quants.quantize(array, stored), stored
            if expand:
                own = gguf.GGMLQuantizationType.F32
                data = gguf.quants.dequantize(data, stored)
            writer.add_tensor(f"{name}.lora_{part}", data, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def token_ids(case: Case) -> list[int]:
    return read_skeleton(case.skeleton).token_ids()[:TOKENS]


_JUDGE = """
import sys, llama_cpp, numpy as np
model, adapter, strength, out, *ids = sys.argv[1:]
tokens = [int(i) for i in ids]
llama = llama_cpp.Llama(
    model, lora_path=adapter, lora_scale=float(strength), n_ctx=512, n_batch=len(tokens),
    n_ubatch=len(tokens), logits_all=True, flash_attn=False, n_threads=1, verbose=False,
    type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
)
llama.eval(tokens)
np.save(out, np.array(llama.scores[: len(tokens)], np.float32))
"""


def main() -> None:
    """Store llama.cpp's logits (T, V) of every case."""
    python = os.environ.get("MLXRUN_LLAMA_PYTHON", sys.executable)
    found = {}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            base, adapter = write(case, Path(folder))
            out = str(Path(folder) / "logits.npy")
            given = [str(base), str(adapter), str(case.strength), out]
            tokens = map(str, token_ids(case))
            subprocess.run([python, "-c", _JUDGE, *given, *tokens], check=True)
            found[name] = np.load(out)
    np.savez_compressed(LOGITS, **found)


if __name__ == "__main__":
    main()
