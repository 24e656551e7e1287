"""mlxrun: run GGUF models on Apple Silicon through MLX.

::

    import mlxrun

    llm = mlxrun.load("model.gguf")
    print(llm.chat([{"role": "user", "content": "Hello!"}]))

Names are imported when they are first used, so that ``import mlxrun`` is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlxrun.kernels import blas as _blas

# Before anything imports MLX: a BLAS that is loaded later is ignored.
_blas.preload()

__version__ = "0.1.0"

_HOMES = {
    "Chunk": "mlxrun.outputs",
    "Comparison": "mlxrun.eval.kl_divergence",
    "Completion": "mlxrun.outputs",
    "ConversionReport": "converters.report",
    "Engine": "mlxrun.engine.engine",
    "Handle": "mlxrun.engine.handle",
    "LLM": "mlxrun.llm",
    "MlxrunError": "mlxrun.errors",
    "Perplexity": "mlxrun.eval.perplexity",
    "Request": "mlxrun.outputs",
    "SamplingDefaults": "mlxrun.sampling_params",
    "SamplingParams": "mlxrun.sampling_params",
    "Session": "mlxrun.engine.sequence",
    "Tokenizer": "mlxrun.tokenizer.tokenizer",
    "Usage": "mlxrun.outputs",
    "compare": "mlxrun.eval.kl_divergence",
    "convert": "mlxrun.conversion",
    "load": "mlxrun.llm",
    "load_tokenizer": "mlxrun.conversion",
}

__all__ = [
    "LLM",
    "Chunk",
    "Comparison",
    "Completion",
    "ConversionReport",
    "Engine",
    "Handle",
    "MlxrunError",
    "Perplexity",
    "Request",
    "SamplingDefaults",
    "SamplingParams",
    "Session",
    "Tokenizer",
    "Usage",
    "__version__",
    "compare",
    "convert",
    "load",
    "load_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mlxrun' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


if TYPE_CHECKING:
    from converters.report import ConversionReport
    from mlxrun.conversion import convert, load_tokenizer
    from mlxrun.engine.engine import Engine
    from mlxrun.engine.handle import Handle
    from mlxrun.engine.sequence import Session
    from mlxrun.errors import MlxrunError
    from mlxrun.eval.kl_divergence import Comparison, compare
    from mlxrun.eval.perplexity import Perplexity
    from mlxrun.llm import LLM, load
    from mlxrun.outputs import Chunk, Completion, Request, Usage
    from mlxrun.sampling_params import SamplingDefaults, SamplingParams
    from mlxrun.tokenizer.tokenizer import Tokenizer
