"""MLX's compiler on a CPU: it records graphs, and fuses nothing.

``mx.compile`` does two things: it records a graph, so that a step need not build it again, and it
fuses chains of elementwise operations. On a CPU the latter runs the system's C++ compiler, some 0.5
s for each new chain, and loads the library of that name from the temporary directory, where another
user may have put one; and that compiler may round differently. Fused steps of small models take a
few percent less time (SmolLM2 135M, gemma 3 270M), which is not worth it: fusion is switched off
for models on a CPU, and on again for those on a GPU. The switch, ``set_compile_mode``, is in MLX's
C++ interface only.
"""

from __future__ import annotations

import ctypes
import io
from functools import cache
from pathlib import Path

import mlx.core as mx

_SYMBOL = "_ZN3mlx4core16set_compile_modeENS0_11CompileModeE"
_NO_FUSE = 2  # of MLX's enum CompileMode
_switched = False  # whether MLX's mode is one that this module set


def avoid_fusion() -> str | None:
    """Switch fusion off on a CPU, and on again on a GPU; call it before ``mx.compile`` records.

    Returns:
        Why functions cannot be recorded and run as plain Python; None if they can.
    """
    global _switched
    if mx.default_device() == mx.cpu:
        return _recorded_unfused()
    if _switched:
        mx.enable_compile()  # from every other mode
        _switched = False
        _recorded_unfused.cache_clear()
    return None


@cache
def _recorded_unfused() -> str | None:
    global _switched
    if not _recording():
        return "no C++ compiler (g++), or compilation is switched off"
    _switched = True
    set_mode = _switch()
    if set_mode is not None:
        set_mode(_NO_FUSE)
        if _recording() == "unfused":
            return None
    mx.disable_compile()
    return "this version of MLX would fuse operations"


def _switch() -> ctypes._NamedFuncPointer | None:
    """``mlx::core::set_compile_mode``; None where this MLX has none."""
    for library in (Path(mx.__file__).parent / "lib").glob("libmlx.*"):
        try:
            found = ctypes.CDLL(str(library))[_SYMBOL]
        except (OSError, AttributeError):
            continue
        found.argtypes, found.restype = [ctypes.c_int], None
        return found
    return None


def _recording() -> str:
    """How MLX's compiler records two operations: "fused", "unfused", or "" for not at all."""
    calls = []

    def function(x: mx.array) -> mx.array:
        calls.append(x)
        return mx.exp(-x)

    compiled, one = mx.compile(function), mx.ones(2)
    compiled(one)
    graph = io.StringIO()
    mx.export_to_dot(graph, compiled(one))
    if len(calls) > 1:
        return ""
    return "fused" if "Compiled" in graph.getvalue() else "unfused"
