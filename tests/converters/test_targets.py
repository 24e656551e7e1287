"""What conversions of files and of directories share: targets, and how they end when they fail."""

from __future__ import annotations

import errno
import re
import shutil
import threading
import time
from pathlib import Path

import pytest
from tiny_models import Tiny, split

import mlxrun
from converters.convert import Hashing
from converters.errors import ConversionError, TargetExistsError
from converters.huggingface.writer import CheckpointWriter
from mlxrun import convert

TARGET = "m"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Tiny().write(tmp_path_factory.mktemp("source") / "model.gguf")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, gguf: Path) -> Path:
    return Path(convert(gguf, tmp_path_factory.mktemp("source") / "model").path)


@pytest.fixture(params=["file", "directory"])
def source(request: pytest.FixtureRequest, gguf: Path, directory: Path) -> Path:
    """Something to convert, of both kinds."""
    return gguf if request.param == "file" else directory


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A directory that a conversion may replace."""
    path = tmp_path / TARGET
    path.mkdir()
    (path / "conversion.json").write_text("{}")
    (path / "LICENSE").write_text("of another model")
    return path


def copy(source: Path, place: Path) -> Path:
    return Path(
        shutil.copytree(source, place) if source.is_dir() else shutil.copyfile(source, place)
    )


def refuses(source: Path, target: Path) -> None:
    """Whether it is replaced or not, nothing in the target is lost."""
    before = {path: path.is_dir() or path.read_bytes() for path in target.rglob("*")}
    for overwrite in (True, False):
        with pytest.raises(TargetExistsError, match=r"holds .*, which is to be converted\. .*-o"):
            mlxrun.convert(source, target, overwrite=overwrite)
    assert {path: path.is_dir() or path.read_bytes() for path in target.rglob("*")} == before


@pytest.mark.parametrize("folder", [".", "deep/er"])
def test_a_target_does_not_hold_its_source(source: Path, target: Path, folder: str) -> None:
    (target / folder).mkdir(parents=True, exist_ok=True)
    refuses(copy(source, target / folder / source.name), target)


def test_a_target_by_another_name_does_not_hold_its_source(
    source: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = copy(source, target / source.name)
    (tmp_path / "link").symlink_to(target)
    refuses(inside, tmp_path / "link")
    refuses(tmp_path / "link" / source.name, target)
    (tmp_path / "named").symlink_to(inside)
    refuses(tmp_path / "named", target)
    monkeypatch.chdir(tmp_path)
    refuses(inside, Path(TARGET))


def test_the_default_target_does_not_hold_its_source(
    gguf: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(target.parent)
    inside = copy(gguf, target.rename(f"{gguf.stem}-mlx") / gguf.name)
    with pytest.raises(TargetExistsError, match="holds"):
        convert(inside, overwrite=True)
    assert inside.exists()


def test_a_target_does_not_hold_a_link_to_its_source(source: Path, target: Path) -> None:
    """The file would stay, but nobody would find it under the name that was given."""
    (target / source.name).symlink_to(source)
    refuses(target / source.name, target)


def test_a_target_holds_no_file_that_its_source_links_to(
    directory: Path, target: Path, tmp_path: Path
) -> None:
    links = copy(directory, tmp_path / "links")
    shutil.move(links / "model.safetensors", target / "weights")
    (links / "model.safetensors").symlink_to(target / "weights")
    refuses(links, target)


def test_a_target_holds_no_shard_of_its_source(target: Path, tmp_path: Path) -> None:
    whole = Tiny().write(tmp_path / "whole.gguf")
    split(whole, tmp_path / "part", shards=2)
    other = "part-00002-of-00002.gguf"
    shutil.move(tmp_path / other, target / other)
    (tmp_path / other).symlink_to(target / other)
    refuses(tmp_path / "part-00001-of-00002.gguf", target)


def test_a_source_may_lie_next_to_or_around_its_target(source: Path, target: Path) -> None:
    copied = copy(source, target.with_name(f"{TARGET}-source"))
    mlxrun.convert(copied, target, overwrite=True)
    assert not (target / "LICENSE").exists()
    if copied.is_dir():
        mlxrun.convert(copied, copied / "inside")


def test_no_thread_outlives_a_failed_write(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(CheckpointWriter, "add", full)
    before = set(threading.enumerate())
    with pytest.raises(OSError, match="full") as failure:
        mlxrun.convert(source, tmp_path / TARGET)
    # The failure's frames are kept alive, as by a caller that prints it.
    assert set(threading.enumerate()) <= before, failure


def test_no_thread_outlives_a_conversion_whose_progress_fails(source: Path, tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt) as failure:
        mlxrun.convert(source, tmp_path / TARGET, progress=interrupt)
    assert set(threading.enumerate()) <= before, failure


@pytest.mark.parametrize("name", ["absent", "."])
def test_a_source_that_cannot_be_hashed_says_so(tmp_path: Path, name: str) -> None:
    readable = tmp_path / "readable"
    readable.write_bytes(b"x")
    unreadable = tmp_path / name
    with (
        Hashing([readable, unreadable]) as hashing,
        pytest.raises(ConversionError, match=f"cannot read {re.escape(str(unreadable))}: "),
    ):
        hashing.result()


class Slow:
    """A file of ten thousand bytes that are read one by one."""

    size = 10_000

    def __init__(self) -> None:
        self.read, self.begun = 0, threading.Event()

    def __enter__(self) -> Slow:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def readinto(self, part: memoryview) -> int:
        self.begun.set()
        time.sleep(0.001)
        self.read += self.read < self.size
        return int(self.read < self.size)


def test_hashing_ends_when_its_result_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow()
    monkeypatch.setattr(Path, "open", lambda *_, **__: slow)
    with Hashing([tmp_path]):
        slow.begun.wait()
    assert slow.read < slow.size
