"""Makes ``tests/oracle/perplexity.json``: figures of llama.cpp's logits of a text.

usage: PYTHON tests/eval/make_figures.py stories260K.gguf

with a PYTHON that has llama-cpp-python. The demo models are dequantized first: llama.cpp rounds
activations to eight bits where weights are Q8_0. Shares no code with what is tested.
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
ASSETS, FIGURES = ROOT / "mlxrun" / "assets", ROOT / "tests" / "oracle" / "perplexity.json"
TEXT = ROOT / "examples" / "kv_formats.txt"

# Model, context, stride (0: windows side by side), whether windows begin with BOS.
CASES = (
    ("stories", 128, 0, True),
    ("stories", 101, 0, True),
    ("stories", 128, 32, False),
    ("demo", 128, 0, True),
)


def dequantized(source: Path, folder: Path) -> Path:
    """The model with float32 weights."""
    target = folder / source.name
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = llama_cpp.LLAMA_FTYPE_ALL_F32, True
    llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    return target


def predictions(
    path: Path, text: str, context: int, stride: int, bos: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities (N, V) before each scored token, and these tokens (N,)."""
    llama = llama_cpp.Llama(
        str(path), n_ctx=context, n_batch=context, n_ubatch=context, logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, verbose=False,
    )  # fmt: skip
    vocabulary = llama_cpp.llama_model_get_vocab(llama.model)
    tokens = llama.tokenize(text.encode(), add_bos=True, special=False)
    first = context - stride - 1 if stride else context // 2
    rows, targets = [], []
    for start in range(0, len(tokens) - context + 1, stride or context):
        window = tokens[start : start + context]
        targets += window[first + 1 :]
        if bos and llama_cpp.llama_vocab_get_add_bos(vocabulary):
            window[0] = llama_cpp.llama_vocab_bos(vocabulary)
        llama.reset()
        llama.eval(window)
        rows.append(llama.scores[first : context - 1].astype(np.float64))
    logits = np.concatenate(rows)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)), np.array(targets)


def mean(x: np.ndarray) -> dict[str, float]:
    error = np.sqrt(((x**2).mean() - x.mean() ** 2) / (len(x) - 1))
    return {"value": float(x.mean()), "error": float(error)}


def of(predicted: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return predicted[np.arange(len(targets)), targets]


def perplexity(models: dict[str, Path], text: str, case: tuple[str, int, int, bool]) -> Any:
    name, context, stride, bos = case
    surprise = -of(*predictions(models[name], text, context, stride, bos))
    facts = {"model": name, "context": context, "stride": stride or None, "bos": bos}
    value = float(np.exp(surprise.mean()))
    return facts | {"tokens": len(surprise), "surprise": mean(surprise), "perplexity": value}


def divergence(models: dict[str, Path], text: str, context: int) -> Any:
    a, targets = predictions(models["demo"], text, context, 0, True)
    b, _ = predictions(models["demo-draft"], text, context, 0, True)
    each = (np.exp(a) * (a - b)).sum(axis=-1)
    change = np.exp(of(b, targets)) - np.exp(of(a, targets))
    return {
        "a": "demo",
        "b": "demo-draft",
        "context": context,
        "divergence": mean(each),
        "largest": float(each.max()),
        "median": float(np.median(each)),
        "agreement": mean((a.argmax(-1) == b.argmax(-1)).astype(float)),
        "log_ratio": mean(of(a, targets) - of(b, targets)),
        "change": mean(change),
        "rms_change": float(np.sqrt((change**2).mean())),
    }


def main() -> None:
    text = TEXT.read_text(encoding="utf-8").removesuffix("\n")
    with tempfile.TemporaryDirectory() as folder:
        models = {"stories": Path(sys.argv[1])}
        for name in ("demo", "demo-draft"):
            models[name] = dequantized(ASSETS / f"{name}.gguf", Path(folder))
        figures = {
            "about": f"llama-cpp-python {llama_cpp.__version__}, float32, CPU; see make_figures.py",
            "text": text,
            "perplexity": [perplexity(models, text, case) for case in CASES],
            "divergence": divergence(models, text, 128),
        }
    FIGURES.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
