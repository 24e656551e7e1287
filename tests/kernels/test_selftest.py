"""The self-test of kernels: its findings, and the records that it trusts later."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from emulated import Emulator

from converters.gguf.types import GGMLType
from converters.quantize.policy import Policy
from mlxrun.errors import KernelsError
from mlxrun.kernels import gpu, selftest
from mlxrun.kernels.interface import Matrix, Missing
from mlxrun.kernels.selftest import GPU_WAYS, TYPES, WORKS, Result, Subject, Way

KIND = GGMLType.Q5_K
SHORT = [replace(work, rows=min(work.rows, 12)) for work in WORKS]


class Plain:
    """Kernels in terms of MLX, of which a test spoils some."""

    def __init__(self, **spoiled: Callable[[mx.array], mx.array]) -> None:
        self.spoiled = spoiled

    def product(self, matrices: list[Matrix], planes: int = 2) -> Any:
        weight = self.values(matrices[0]).T
        return lambda x: [self._spoilt("product", x @ weight.astype(x.dtype))]

    def experts(self, matrices: list[Matrix], planes: int = 2) -> Any:
        weight = self.values(matrices[0]).swapaxes(-1, -2)
        return lambda x, chosen: [
            self._spoilt("experts", mx.gather_mm(x.astype(mx.float32), weight, rhs_indices=chosen))
        ]

    def dequantize(self, matrix: Matrix) -> mx.array:
        return self._spoilt("dequantize", self.values(matrix))

    def values(self, matrix: Matrix) -> mx.array:
        raw = matrix.blocks
        import numpy as np

        flat = selftest._values(matrix.type, np.array(raw).reshape(-1, 176))
        return mx.array(flat).reshape(*raw.shape[:-1], matrix.columns)

    def _spoilt(self, what: str, out: mx.array) -> mx.array:
        return self.spoiled.get(what, lambda same: same)(out)


def result_of(kernels: selftest.Kernels, **how: Any) -> Result:
    ways = (Way("float32", mx.float32, 0, 1e-6),)
    subject = Subject("a device", {"blocks": kernels}, ways, Policy("near"))
    (result,) = selftest.run(subject, [KIND], works=SHORT, rows=32, columns=256, **how)
    return result


def test_what_is_right_passes_and_is_timed() -> None:
    result = result_of(Plain())
    assert result.passed
    assert list(result.seconds) == [work.name for work in WORKS]
    assert all(set(times) == {"blocks", "repacked"} for times in result.seconds.values())
    assert all(seconds > 0 for times in result.seconds.values() for seconds in times.values())


@pytest.mark.parametrize("what", ["product", "experts"])
@pytest.mark.parametrize("spoil", [lambda out: out * 1.00001, lambda out: out + float("nan")])
def test_products_that_are_off_do_not_pass(
    what: str, spoil: Callable[[mx.array], mx.array]
) -> None:
    result = result_of(Plain(**{what: spoil}))
    assert not result.passed
    assert result.wrong == ("float32",)
    assert result.equal


def test_rows_that_differ_in_one_bit_do_not_pass() -> None:
    def spoil(out: mx.array) -> mx.array:
        bits = mx.contiguous(out).view(mx.uint32)
        bits[..., 3, 7] = mx.bitwise_xor(bits[..., 3, 7], mx.array(1, mx.uint32))
        return bits.view(mx.float32)

    result = result_of(Plain(dequantize=spoil))
    assert not result.equal
    assert not result.passed


def test_kernels_that_cannot_run_are_named() -> None:
    def fail(out: mx.array) -> mx.array:
        raise RuntimeError("[metal::Device] Unable to build\nmetal library")

    result = result_of(Plain(dequantize=fail))
    assert not result.passed
    assert result.problem == "[metal::Device] Unable to build metal library"


def test_metals_kernels_through_the_shim(tmp_path: Path) -> None:
    """In both ways to multiply many rows, and in all dtypes, as on a GPU."""
    emulator = Emulator(tmp_path)
    kernels = {
        "blocks": gpu.Kernels(gpu.METAL, fused=TYPES, make=emulator.kernel),
        "expanded": gpu.Kernels(gpu.METAL, make=emulator.kernel),
    }
    subject = Subject("emulated", kernels, GPU_WAYS, Policy("near", "float32"))
    works = [replace(work, rows=min(work.rows, 34)) for work in WORKS]
    with emulator.record():
        selftest.run(subject, [KIND], works=works, rows=32, columns=256)
    (result,) = selftest.run(subject, [KIND], works=works, rows=32, columns=256)
    assert result.passed, result


def results(**fastest: str) -> list[Result]:
    """Made-up ones: of each type, the fastest one for all works."""
    names = ("blocks", "expanded", "repacked")
    return [
        Result(
            GGMLType[kind],
            True,
            {"float16": 1e-4},
            (),
            {work.name: {name: 1.0 + (name != best) for name in names} for work in WORKS},
        )
        for kind, best in fastest.items()
    ]


def test_what_has_passed_is_kept_for_the_device_and_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "kernels"
    made = results(Q4_K="blocks", Q6_K="expanded", Q4_0="repacked")
    assert selftest.kept("M9", folder) is None
    passed = selftest.keep("M9", made, folder)
    assert selftest.kept("M9", folder) == passed
    assert passed.served() == {GGMLType.Q4_K, GGMLType.Q6_K}
    assert passed.fused() == {GGMLType.Q4_K}
    assert (folder / "selftest.json").stat().st_mode & 0o777 == 0o600
    assert selftest.kept("M8", folder) is None
    monkeypatch.setattr(selftest, "__version__", "0.0.0")
    assert selftest.kept("M9", folder) is None
    monkeypatch.undo()
    monkeypatch.setattr(mx, "__version__", "0.0.0")
    assert selftest.kept("M9", folder) is None
    monkeypatch.undo()
    selftest.forget(folder)
    assert selftest.kept("M9", folder) is None
    selftest.forget(folder)


def test_nothing_is_kept_of_kernels_that_fail(tmp_path: Path) -> None:
    failed = replace(results(Q4_K="blocks")[0], wrong=("float16",))
    with pytest.raises(ValueError, match="Q4_K"):
        selftest.keep("M9", [failed], tmp_path / "kernels")
    assert not (tmp_path / "kernels").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text("{"),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text(path.read_text().replace("Q4_K", "Q4_Z")),
        lambda path: path.write_text(path.read_text().replace('"1 row"', '"2 rows"')),
        lambda path: path.chmod(0o622),
        lambda path: path.write_bytes(b"\xff\xfe"),
    ],
)
def test_a_file_that_is_not_as_it_was_written_says_nothing(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    folder = tmp_path / "kernels"
    selftest.keep("M9", results(Q4_K="blocks"), folder)
    damage(folder / "selftest.json")
    assert selftest.kept("M9", folder) is None


def test_a_folder_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    folder.mkdir(mode=0o700)
    folder.chmod(0o777)
    with pytest.raises(KernelsError, match="other users"):
        selftest.keep("M9", results(Q4_K="blocks"), folder)


@pytest.fixture
def mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As if there were a GPU, with a cache of its own; returns its folder."""
    monkeypatch.setattr(gpu, "language", lambda: gpu.METAL)
    monkeypatch.setattr(gpu, "device_name", lambda: "M9")
    monkeypatch.setattr(selftest, "place", lambda: tmp_path / "kernels")
    return tmp_path / "kernels"


def test_a_gpu_has_kernels_only_after_the_test(mac: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    types = [GGMLType.Q4_K, GGMLType.Q4_0]
    found = gpu.available(types)
    assert isinstance(found, Missing)
    assert "mlxrun kernels --selftest" in found.reason
    selftest.keep("M9", results(Q4_K="blocks", Q6_K="blocks", Q4_0="repacked"))
    found = gpu.available(types)
    assert isinstance(found, gpu.Kernels)
    assert found.types == {GGMLType.Q4_K}
    assert isinstance(gpu.available([GGMLType.Q4_0]), Missing)
    monkeypatch.setenv("MLXRUN_KERNELS", "0")
    assert isinstance(gpu.available(types), Missing)


def test_there_are_none_for_a_gpu_on_the_cpu() -> None:
    assert gpu.available([GGMLType.Q4_K]) == Missing("no GPU")


def test_the_record_is_json_that_names_what_it_is_for(mac: Path) -> None:
    selftest.keep("M9", results(Q4_K="blocks"))
    record = json.loads((mac / "selftest.json").read_text())
    assert record["for"]["device"] == "M9"
    assert set(record["for"]) == {"device", "system", "mlxrun", "mlx"}
