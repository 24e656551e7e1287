"""Mapped files: shared, let go, and cut while they are in use."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from converters.errors import GGUFError
from converters.gguf.reader import GGUFFile, read_gguf
from converters.gguf.types import GGMLType
from mlxrun.kernels import dispatch as kernels
from mlxrun.kernels.dispatch import Kernels

DEMO = Path(kernels.__file__).parents[1] / "assets" / "demo.gguf"
ROOT = Path(kernels.__file__).parents[2]
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture(scope="module")
def k() -> Kernels:
    found = kernels.available({GGMLType.Q8_0, GGMLType.F32, GGMLType.F16})
    assert isinstance(found, Kernels), found
    return found


@pytest.fixture
def file(tmp_path: Path) -> GGUFFile:
    path = tmp_path / "mapped.gguf"
    path.write_bytes(DEMO.read_bytes())
    return read_gguf(path)


def mappings(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(path.resolve()))


def test_a_tensor_s_bytes_as_they_are_in_the_file(k: Kernels, file: GGUFFile) -> None:
    for tensor in file.tensors:
        mapped = k.map(tensor)
        assert mapped.shape[:-1] == tensor.shape[:-1]
        assert np.array_equal(np.array(mapped).ravel(), tensor.raw())


def test_operations_of_mlx_take_mapped_bytes(k: Kernels, file: GGUFFile) -> None:
    tensor = file.tensor("token_embd.weight")
    mapped, raw = k.map(tensor), tensor.raw().reshape(tensor.shape[0], -1)
    assert np.array_equal(np.array(mx.contiguous(mapped.T)), raw.T)
    assert np.array_equal(np.array(mapped.reshape(-1)[5:100] + 1), raw.ravel()[5:100] + 1)
    assert np.array_equal(np.array(mapped[mx.array([3, 1])]), raw[[3, 1]])
    assert np.array_equal(np.array(mx.concatenate([mapped[:2], mapped[7:9]])), raw[[0, 1, 7, 8]])


@linux
def test_a_file_is_mapped_once_until_no_array_refers_to_it(k: Kernels, file: GGUFFile) -> None:
    before = mx.get_active_memory()
    arrays = [k.map(tensor) for tensor in file.tensors]
    assert mappings(file.path) == 1
    assert mx.get_active_memory() == before
    last = arrays[3][1:]
    mx.eval(last)
    del arrays
    gc.collect()
    assert mappings(file.path) == 1
    del last
    gc.collect()
    assert mappings(file.path) == 0
    k.check()


@linux
def test_what_is_not_computed_yet_keeps_the_file_mapped(k: Kernels, file: GGUFFile) -> None:
    tensor = file.tensor("blk.0.attn_q.weight")
    expected = np.array(k.dequantize(kernels.Matrix(k.map(tensor), tensor.type, tensor.shape[1])))
    later = k.dequantize(kernels.Matrix(k.map(tensor), tensor.type, tensor.shape[1]))
    gc.collect()
    assert mappings(file.path) == 1
    assert np.array_equal(np.array(later), expected)


def test_a_file_that_is_cut_before_it_is_mapped(k: Kernels, file: GGUFFile) -> None:
    with file.path.open("rb+") as opened:
        opened.truncate(file.tensors[-1].offset)
    with pytest.raises(GGUFError, match="file that can be mapped"):
        for tensor in file.tensors:
            k.map(tensor)


def test_a_file_that_is_written_anew_is_mapped_anew(k: Kernels, file: GGUFFile) -> None:
    tensor = file.tensors[0]
    kept = k.map(tensor)
    raw = bytearray(file.path.read_bytes())
    raw[tensor.offset] ^= 0xFF
    other = file.path.with_name("other")
    other.write_bytes(raw)
    other.replace(file.path)
    again = k.map(read_gguf(file.path).tensors[0])
    assert np.array(again).ravel()[0] == np.array(kept).ravel()[0] ^ 0xFF


# ---- a file that is cut while it is mapped: each in a process of its own -------------------------

BEFORE = """
import os, sys, signal, threading
from pathlib import Path
import mlx.core as mx
import numpy as np
from converters.errors import GGUFError
from converters.gguf.file import GGUFTensor, OpenFile
from converters.gguf.types import GGMLType
from mlxrun.kernels import dispatch as kernels

ROWS, COLUMNS = 4096, 1024
path = Path(sys.argv[1])
path.write_bytes(np.random.default_rng(0).standard_normal((ROWS, COLUMNS), np.float32).tobytes())
k = kernels.available({GGMLType.F32})
opened = OpenFile(os.open(path, os.O_RDONLY))
tensor = GGUFTensor("w", (ROWS, COLUMNS), GGMLType.F32, 4 * ROWS * COLUMNS, 0, path, 0, opened)
blocks = k.map(tensor)
product = k.product([kernels.Matrix(blocks, GGMLType.F32, COLUMNS)])
x = mx.ones((1, COLUMNS))
whole = np.array(product(x)[0])
k.check()
"""

CUT = """
os.truncate(path, path.stat().st_size // 3)
"""


def run(tmp_path: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-c", BEFORE + code, str(tmp_path / "blocks")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


@pytest.mark.parametrize("threads", ["1", "4"])
def test_a_file_cut_while_it_is_mapped(tmp_path: Path, threads: str) -> None:
    done = run(
        tmp_path,
        CUT
        + """
part = np.array(product(x)[0])
try:
    k.check()
except GGUFError as error:
    print(error)
third = ROWS // 3 - 8
assert np.array_equal(part[0, :third], whole[0, :third])
assert not part[0, ROWS // 3 + 8 :].any()
assert isinstance(kernels.available({GGMLType.F32}), kernels.Kernels)
kernels.available({GGMLType.F32}).check()  # another file is not meant

# Whole again, it is mapped anew.
path.write_bytes(np.ones((ROWS, COLUMNS), np.float32).tobytes())
opened = OpenFile(os.open(path, os.O_RDONLY))
tensor = GGUFTensor("w", (ROWS, COLUMNS), GGMLType.F32, 4 * ROWS * COLUMNS, 0, path, 0, opened)
again = kernels.available({GGMLType.F32})
m = kernels.Matrix(again.map(tensor), GGMLType.F32, COLUMNS)
assert (np.array(again.product([m])(x)[0]) == COLUMNS).all()
again.check()
print("alive")
""",
        MLXRUN_THREADS=threads,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert "cut short" in said[0]
    assert "fetch it again" in said[0]
    assert said[-1] == "alive"


def test_a_file_cut_while_several_threads_read_it(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
problems, stop = [], threading.Event()
def work():
    try:
        while not stop.is_set():
            with mx.stream(mx.new_stream(mx.cpu)):
                mx.eval(product(x)[0])
    except BaseException as error:
        problems.append(error)
threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads: thread.start()
os.truncate(path, 100_000)
while True:
    try:
        k.check()
    except GGUFError:
        break
stop.set()
for thread in threads: thread.join()
assert not problems
print("alive")
""",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "alive"


FOREIGN = """
import mmap
other = path.with_name("other")
other.write_bytes(bytes(100_000))
with other.open("rb") as file:
    foreign = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
os.truncate(other, 0)
"""


def test_faults_elsewhere_still_end_the_process(tmp_path: Path) -> None:
    done = run(tmp_path, FOREIGN + "print(foreign[90_000])")
    assert done.returncode == -7, (done.returncode, done.stderr)


def test_an_earlier_handler_gets_faults_elsewhere(tmp_path: Path) -> None:
    before = "import faulthandler; faulthandler.enable()\n"
    code = before + BEFORE + FOREIGN + "print(foreign[90_000])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "blocks")],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == -7
    assert "Fatal Python error: Bus error" in done.stderr


def test_a_signal_that_was_sent_is_not_taken_for_a_fault(tmp_path: Path) -> None:
    done = run(tmp_path, "os.kill(os.getpid(), signal.SIGBUS)\nprint('alive')")
    assert done.returncode == -7
    assert "alive" not in done.stdout
