"""CUDA's kernels: nvcc compiles every type, body, dtype and way to choose rows. None is run."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from converters.gguf.types import GGMLType
from mlxrun.kernels.gpu import CUDA, INPUTS, TYPES, body, header

DTYPES = {"float": "float", "half": "__half", "bfloat16": "__nv_bfloat16"}

# What of MLX's own header, which comes first, the kernels use.
PRELUDE = """#include <cstdint>
struct Shape {
  int32_t sizes[10];
  __device__ int32_t operator[](int i) const { return sizes[i]; }
};
"""


def variants(name: str) -> Iterator[dict[str, str | int]]:
    """Arguments of a kernel's template: every dtype, few and many rows, gathered and not."""
    for dtype in DTYPES.values():
        if name == "rows":
            yield {"T": dtype}
        elif name == "matmul":
            yield {"T": dtype, "TILE": dtype, "ORDERED": 1, "GATHER": 0}
            yield {"T": dtype, "TILE": dtype, "ORDERED": 0, "GATHER": 1}
        else:
            yield {"T": dtype, "XROWS": 1, "ORDERED": 0, "GATHER": 0}
            yield {"T": dtype, "XROWS": 8, "ORDERED": 1, "GATHER": 0}
            yield {"T": dtype, "XROWS": 1, "ORDERED": 1, "GATHER": 1}


def function(name: str, number: int, template: dict[str, str | int]) -> str:
    """A kernel as MLX writes it, with its shapes where the body reads them."""
    types = {"w": "uint8_t", "x": template["T"]}
    text = body(CUDA, name)
    parameters = []
    for each in INPUTS[name]:
        parameters.append(f"const {types.get(each, 'int32_t')}* {each}")
        if f"{each}_shape" in text:
            parameters.append(f"const __grid_constant__ Shape {each}_shape")
    lines = [
        f"using {key} = {value};" if key in ("T", "TILE") else f"constexpr int {key} = {value};"
        for key, value in template.items()
    ]
    head = f"__global__ void {name}_{number}({', '.join(parameters)}, {template['T']}* out) {{\n"
    return head + "\n".join(lines) + f"\n{text}\n}}\n"


def unit(kinds: Sequence[GGMLType]) -> str:
    """One translation unit: the common part once, then each type in a namespace."""
    shared = header(CUDA, GGMLType.IQ1_S).split("#define DECODE")[0]
    text = PRELUDE + shared
    for kind in kinds:
        own = "#define DECODE" + header(CUDA, kind).split("#define DECODE")[1]
        text += f"namespace of_{kind.name} {{\n{own}\n"
        for name in INPUTS:
            text += "".join(function(name, i, how) for i, how in enumerate(variants(name)))
        text += "}\n" + "".join(f"#undef {each}\n" for each in re.findall(r"#define (\w+)", own))
    return text


def test_every_type_compiles(tmp_path: Path) -> None:
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc: CUDA's kernels are not compiled here")
    source = tmp_path / "kernels.cu"
    source.write_text(unit(list(TYPES)))
    # Not optimized: that takes ten times as long, and refuses nothing.
    command = ["nvcc", "-std=c++17", "-arch=sm_80", "-Xcicc", "-O0", "-ptx", str(source)]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "out.ptx")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[:3000]
    entries = re.findall(r"\.entry (\w+)", (tmp_path / "out.ptx").read_text())
    kernels = sum(len(list(variants(name))) for name in INPUTS)
    assert len(set(entries)) == len(TYPES) * kernels
