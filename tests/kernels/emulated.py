"""Metal kernels on the CPU: the text that MLX gives to Metal's compiler, compiled over a shim."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from decoders import HERE, compiler

from mlxrun.kernels.gpu import METAL

SHIM = HERE / "metal"
C_NAMES = {mx.float32: "float", mx.float16: "float16_t", mx.bfloat16: "bfloat16_t"}
ATTRIBUTES = {
    "thread_index_in_simdgroup": "emulator::index() % 32",
    "simdgroup_index_in_threadgroup": "emulator::index() / 32",
    "thread_index_in_threadgroup": "emulator::index()",
    "threadgroup_position_in_grid": "launch->position",
}


def metal_text(
    kernel: Any, header: str, inputs: Sequence[mx.array], folder: Path, **how: Any
) -> str:
    """The text of a kernel as MLX gives it to Metal: an export records it where Metal is not."""
    path = folder / "kernel.mlxfn"
    mx.export_function(str(path), lambda *a: kernel(inputs=list(a), **how), *inputs)
    raw = path.read_bytes()
    end = raw.index(b";\n", raw.index(b"template [[host_name(")) + 2
    return raw[raw.index(header.encode()) : end].decode()


class Emulator:
    """Stands for ``mx.fast.metal_kernel``; kernels that are new are compiled by :meth:`compile`.

    Args:
        folder: for compiled objects.
        flags: more of the compiler's.
    """

    def __init__(self, folder: Path, *flags: str) -> None:
        self.folder, self.flags, self.device = folder, flags, METAL
        self.functions: dict[str, Any] = {}
        self.new: dict[str, str] = {}
        self.recording = self.reversed = False
        self._compile("emulator.so", SHIM / "emulator.cpp")

    def kernel(
        self, name: str, input_names: list[str], output_names: list[str], source: str, header: str
    ) -> Any:
        """As ``mx.fast.metal_kernel``."""
        real = mx.fast.metal_kernel(name, input_names, output_names, source, header)

        def call(*, inputs: list[mx.array], **how: Any) -> list[mx.array]:
            text = metal_text(real, header, inputs, self.folder, **how)
            found = re.search(r'host_name\("(\w+)"\)', text)
            assert found
            shapes, dtypes = how["output_shapes"], how["output_dtypes"]
            if self.recording:
                self.new.setdefault(found[1], text)
                return [mx.zeros(s, d) for s, d in zip(shapes, dtypes, strict=True)]
            buffers = [np.array(a.view(mx.uint8)) for a in inputs]
            arguments = []
            for array, buffer, argument in zip(inputs, buffers, input_names, strict=True):
                arguments.append(buffer)
                if f"{argument}_shape" in source:
                    arguments.append(np.array(array.shape, np.int32))
            (shape,), (dtype,) = shapes, dtypes
            out = np.full((*shape[:-1], shape[-1] * dtype.size), 0xFF, np.uint8)  # NaN
            self._run(found[1], [*arguments, out], how["grid"], how["threadgroup"])
            return [mx.array(out).view(dtype)]

        return call

    @contextmanager
    def record(self) -> Iterator[None]:
        """Calls within return zeros; their kernels are compiled, together, at the end."""
        self.recording = True
        yield
        self.recording = False
        self.compile()

    def compile(self) -> None:
        new = {name: text for name, text in self.new.items() if name not in self.functions}
        self.new.clear()
        if not new:
            return
        path = self.folder / f"{min(new)}.cpp"
        path.write_text('#include "metal_shim.h"\n' + "\n".join(map(_translated, new.values())))
        library = self._compile(f"{path.stem}.so", path, str(self.folder / "emulator.so"))
        for name in new:
            self.functions[name] = getattr(library, f"run_{name}")

    def _run(self, name: str, arguments: list[np.ndarray], grid: Any, threadgroup: Any) -> None:
        pointers = (ctypes.c_void_p * len(arguments))(*[a.ctypes.data for a in arguments])
        groups = [-(-g // t) for g, t in zip(grid, threadgroup, strict=True)]
        assert groups[2] == threadgroup[1] == threadgroup[2] == 1
        assert grid[0] % threadgroup[0] == 0  # no threadgroup is a part of one
        self.functions[name](pointers, *groups[:2], threadgroup[0], self.reversed)

    def _compile(self, name: str, source: Path, *more: str) -> ctypes.CDLL:
        out = self.folder / name
        fixed = ["-std=c++17", "-O0", "-w", "-fPIC", "-shared", f"-I{SHIM}", *self.flags]
        files = [str(source), *more, "-o", str(out), f"-Wl,-rpath,{self.folder}"]
        subprocess.run([compiler(), *fixed, *files], check=True)
        return ctypes.CDLL(str(out), mode=ctypes.RTLD_GLOBAL)


def _translated(text: str) -> str:
    """A kernel in a namespace of its own, and a function that runs a grid of it."""
    text, instance = text.split("template [[host_name(")
    found = re.match(r'"(\w+)"\)\]\] \[\[kernel\]\] decltype\((.+)\) \2;', instance)
    assert found
    name, called = found.groups()
    signature = text[text.index(f"void {name}(") :]
    parameters = re.findall(r"^  (.+?) \[\[(.+?)\]\]", signature[: signature.index(") {")], re.M)
    passed = []
    for declaration, attribute in parameters:
        position = re.fullmatch(r"buffer\((\d+)\)", attribute)
        kind = declaration.rsplit(" ", 1)[0]
        passed.append(
            f"({kind})launch->buffers[{position[1]}]" if position else ATTRIBUTES[attribute]
        )
    undefined = "\n".join(f"#undef {macro}" for macro in re.findall(r"#define (\w+)", text))
    return f"""
namespace of_{name} {{
{text}
struct Launch {{ void** buffers; uint3 position; }};
static void body(void* given) {{
  Launch* launch = (Launch*)given;
  {called}({", ".join(passed)});
}}
}}
extern "C" void run_{name}(void** buffers, uint x, uint y, uint threads, bool reversed) {{
  for (uint i = 0; i < x * y; i++) {{
    of_{name}::Launch launch{{buffers, {{i % x, i / x, 0}}}};
    emulator::run(threads, reversed, of_{name}::body, &launch);
  }}
}}
{undefined}
"""
