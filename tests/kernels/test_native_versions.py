"""Other versions of MLX: ``MLXRUN_MLX_PYTHONS`` names interpreters that have them, by colons.

python3 -m venv v && v/bin/pip install 'mlx[cpu]==0.30.0' numpy
MLXRUN_MLX_PYTHONS=v/bin/python pytest tests/kernels/test_native_versions.py
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = [name for name in os.environ.get("MLXRUN_MLX_PYTHONS", "").split(":") if name]

WORK = """
import gc, os, sys, threading
from pathlib import Path
import mlx.core as mx
import numpy as np
from converters.quantize.encode import plain_floats
from converters.errors import GGUFError
from converters.gguf.reader import read_gguf
from mlxrun.kernels import dispatch as kernels

path = Path(sys.argv[1])
path.write_bytes(Path("mlxrun/assets/demo.gguf").read_bytes())
file = read_gguf(path)
k = kernels.available({tensor.type for tensor in file.tensors})  # and its test in a child
assert isinstance(k, kernels.Kernels), k.reason
tensor = file.tensor("blk.0.ffn_up.weight")
matrix = kernels.Matrix(k.map(tensor), tensor.type, tensor.shape[-1])
weights = plain_floats(tensor)
assert np.array_equal(np.array(k.dequantize(matrix)), weights)

product, norm = k.product([matrix, matrix], 3), k.rms_norm(None, 1e-5)
def step(x):
    first, second = product(norm(x))
    return first + 2 * second
def close(x, y):
    z = np.array(x).astype(np.float64)
    z = 3 * z / np.sqrt(np.square(z).mean(-1, keepdims=True) + 1e-5) @ weights.T.astype(np.float64)
    assert np.abs(np.array(y) - z).max() < 1e-4, np.abs(np.array(y) - z).max()
for recorded in (step, mx.compile(step), mx.compile(step, shapeless=True)):
    for rows in (1, 7, 1):
        x = mx.random.normal((rows, tensor.shape[-1]))
        close(x, recorded(x))
        y = recorded(x)
        mx.async_eval(y)
        close(x, y)
        wide = mx.random.normal((tensor.shape[-1], rows)).T  # does not lie in order
        close(wide, recorded(wide))

# For any thread: streams are a thread's own in some versions of MLX, and all threads' in others.
new_stream = getattr(mx, "new_thread_unsafe_stream", mx.new_stream)
problems, streams = [], [new_stream(mx.cpu) for _ in range(3)]
def work(stream):
    try:
        for _ in range(20):
            with mx.stream(stream):
                x = mx.random.normal((2, tensor.shape[-1]), key=mx.random.key(1))
                y = step(x)
                mx.eval(x, y)
            close(x, y)
    except BaseException as error:
        problems.append(error)
threads = [threading.Thread(target=work, args=(stream,)) for stream in streams]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not problems, problems

try:
    product(x[..., :3])
except ValueError:
    pass
else:
    raise AssertionError("not refused")
if sys.platform == "linux":
    path = path.with_name("cut.gguf")  # MLX before 0.32.4 keeps some compiled graphs for good
    path.write_bytes(Path("mlxrun/assets/demo.gguf").read_bytes())
    kept = k.map(read_gguf(path).tensor("blk.0.ffn_up.weight"))
    assert Path("/proc/self/maps").read_text().count(str(path.resolve())) == 1
    os.truncate(path, 4096)
    np.array(kept)
    try:
        k.check()
    except GGUFError:
        pass
    else:
        raise AssertionError("not noticed")
    del kept
    gc.collect()
    assert str(path.resolve()) not in Path("/proc/self/maps").read_text()
print(mx.__version__)
"""


@pytest.mark.skipif(not PYTHONS, reason="MLXRUN_MLX_PYTHONS names no interpreters")
@pytest.mark.parametrize("python", PYTHONS)
def test_the_glue_fits_another_version(python: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [python, "-c", WORK, str(tmp_path / "demo.gguf")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MLXRUN_BLAS": "0"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
