"""The wheel of compiled objects, of small ones."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mlxrun.kernels import build
from mlxrun.kernels.build import Object
from tools import kernels_wheel


@pytest.fixture
def wheel(tmp_path: Path) -> tuple[Path, Object]:
    source = tmp_path / "made.cpp"
    source.write_text('extern "C" int answer() { return 42; }\n')
    made = Object("core-portable", (source,), ("-shared", "-fPIC"))
    paths = kernels_wheel.compiled([made], tmp_path)
    return kernels_wheel.write([made], paths, tmp_path / "dist"), made


def test_its_name_and_record(wheel: tuple[Path, Object]) -> None:
    path, _ = wheel
    name, number, python, abi, system = path.stem.split("-")
    assert (name, python, abi) == ("mlxrun_kernels", "py3", "none")
    assert system.startswith("manylinux_2_" if sys.platform == "linux" else "macosx_")
    with zipfile.ZipFile(path) as archive:
        info = f"mlxrun_kernels-{number}.dist-info"
        assert f"Tag: py3-none-{system}" in archive.read(f"{info}/WHEEL").decode()
        record = archive.read(f"{info}/RECORD").decode()
        listed = {name: (hash_, size) for name, hash_, size in csv.reader(io.StringIO(record))}
        assert set(listed) == set(archive.namelist())
        for entry in set(listed) - {f"{info}/RECORD"}:
            content = archive.read(entry)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
            assert listed[entry] == (f"sha256={digest.decode()}", str(len(content)))


def test_what_it_installs_is_found(
    wheel: tuple[Path, Object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, made = wheel
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps",
         "--disable-pip-version-check", "--target", str(site), str(path)],
        check=True,
    )  # fmt: skip
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delitem(sys.modules, "mlxrun_kernels", raising=False)
    build.shipped.cache_clear()
    try:
        assert build.find_shipped(made) == site / "mlxrun_kernels" / "core-portable.so"
    finally:
        build.shipped.cache_clear()
        sys.modules.pop("mlxrun_kernels", None)
