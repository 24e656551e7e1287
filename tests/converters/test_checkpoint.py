"""The checkpoint writer: what others read back, and what is left when it fails."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from converters import checkpoint
from converters.checkpoint import CheckpointWriter
from converters.errors import CheckpointError, OutOfSpaceError, TargetExistsError

ARRAYS = {
    "a.weight": (np.arange(12, dtype=np.uint32).reshape(3, 4), "uint32"),
    "a.scales": (np.array([[0.5], [1.5], [-2.0]], np.float16), "float16"),
    "b.weight": (np.array([0x3F80, 0xC000], np.uint16), "bfloat16"),  # 1 and -2
    "c.weight": (np.array([1e-30, 3.5], np.float32), "float32"),
    "d.scales": (np.array([[1, 2, 255]], np.uint8), "uint8"),
}
DEAD = 2**22 + 1  # above the largest process id that Linux gives


def write(path: Path, *, overwrite: bool = False, marker: str = "{}") -> None:
    with CheckpointWriter(path, overwrite=overwrite) as writer:
        for name, (array, dtype) in ARRAYS.items():
            writer.add(name, array, dtype)
        writer.write_file("config.json", marker)
        writer.commit()


def read(path: Path) -> dict[str, mx.array]:
    arrays: dict[str, mx.array] = {}
    for file in path.glob("*.safetensors"):
        arrays |= mx.load(str(file))
    return arrays


def assert_complete(path: Path) -> None:
    arrays = read(path)
    assert set(arrays) == set(ARRAYS)
    for name, (array, dtype) in ARRAYS.items():
        assert str(arrays[name].dtype) == f"mlx.core.{dtype}"
        got = arrays[name].view(mx.uint16) if dtype == "bfloat16" else arrays[name]
        np.testing.assert_array_equal(np.array(got), array)


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_mlx_reads_every_array(tmp_path: Path) -> None:
    write(tmp_path / "model")
    assert_complete(tmp_path / "model")
    assert names(tmp_path) == {"model"}
    assert names(tmp_path / "model") == {
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
    }


def test_the_header_is_what_the_format_says(tmp_path: Path) -> None:
    write(tmp_path / "model")
    data = (tmp_path / "model" / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert data[8:9] == b"{"
    assert (8 + size) % 8 == 0
    end = 0
    assert header.pop("__metadata__") == {"format": "mlx"}
    for entry in header.values():  # neither gaps nor overlaps, to the end of the file
        assert entry["data_offsets"][0] == end
        end = entry["data_offsets"][1]
    assert len(data) == 8 + size + end


def test_shards_and_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 50)
    write(tmp_path / "model")
    assert_complete(tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert files == {
        f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
    }
    assert len(files) > 1
    assert index["metadata"]["total_size"] == sum(array.nbytes for array, _ in ARRAYS.values())
    for name, file in index["weight_map"].items():
        assert name in mx.load(str(tmp_path / "model" / file))


def test_an_existing_target_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "model"
    write(target, marker='{"first": 1}')
    with pytest.raises(TargetExistsError, match="already exists"):
        write(target)
    assert json.loads((target / "config.json").read_text()) == {"first": 1}


def test_overwriting_replaces_a_model_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "model", marker='{"first": 1}')
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    write(tmp_path / "model", overwrite=True)
    assert_complete(tmp_path / "model")
    assert "tokenizer.json" not in names(tmp_path / "model")
    for precious in ("photos", "file"):
        path = tmp_path / precious
        if precious == "photos":
            path.mkdir()
            (path / "cat.jpg").write_text("meow")
        else:
            path.write_text("text")
        with pytest.raises(TargetExistsError, match="not a model directory"):
            write(path, overwrite=True)
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "meow"
    assert (tmp_path / "file").read_text() == "text"


@pytest.mark.parametrize("precious", ["notes.txt", "src", ".git", "adapters.safetensors"])
def test_what_else_lies_beside_a_model_keeps_it_from_being_replaced(
    tmp_path: Path, precious: str
) -> None:
    write(tmp_path / "model", marker='{"first": 1}')
    (tmp_path / "model" / precious).mkdir()
    with pytest.raises(TargetExistsError, match=rf"not a model directory: it holds {precious}"):
        write(tmp_path / "model", overwrite=True)
    assert (tmp_path / "model" / precious).is_dir()
    assert json.loads((tmp_path / "model" / "config.json").read_text()) == {"first": 1}


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with (
        pytest.raises(TargetExistsError),
        CheckpointWriter(target) as writer,
    ):
        writer.add("w", np.zeros(3, np.float32), "float32")
        target.mkdir()
        (target / "config.json").write_text('{"other": 1}')
        writer.commit()
    assert names(tmp_path) == {"model"}
    assert (target / "config.json").read_text() == '{"other": 1}'


@pytest.mark.parametrize("failure", [ValueError("x"), KeyboardInterrupt()])
def test_nothing_is_left_of_what_fails(tmp_path: Path, failure: BaseException) -> None:
    with pytest.raises(type(failure)), CheckpointWriter(tmp_path / "deep" / "model") as writer:
        writer.add("w", np.zeros(3, np.float32), "float32")
        assert names(tmp_path / "deep")  # something is being written
        raise failure
    assert names(tmp_path / "deep") == set()


@pytest.mark.parametrize("name", ["model", "odd [name]*", "new\nline"])
def test_leftovers_of_dead_conversions_are_swept(tmp_path: Path, name: str) -> None:
    living = tmp_path / f".{name}.partial-{os.getppid()}"
    others = tmp_path / f".other.partial-{DEAD}"
    dead = [tmp_path / f".{name}.partial-{DEAD}", tmp_path / f".{name}.partial-{DEAD}-old"]
    for folder in (living, others, *dead):
        folder.mkdir()
        (folder / "config.json").write_text('{"old": 1}')
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text("{}")
    write(tmp_path / name, overwrite=True)
    assert names(tmp_path) == {name, living.name, others.name}


def test_a_model_whose_replacement_was_killed_comes_back(tmp_path: Path) -> None:
    """Killed between giving the old model another name and giving the new one its own."""
    old = tmp_path / f".model.partial-{DEAD}-old"
    old.mkdir()
    (old / "config.json").write_text('{"old": 1}')
    with pytest.raises(TargetExistsError):
        write(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text()) == {"old": 1}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_so(tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def add(self, *_: object) -> None:
            raise OSError(code, os.strerror(code))

    with pytest.raises(OutOfSpaceError, match="full"), CheckpointWriter(tmp_path / "m") as writer:
        writer.add("w", np.zeros(3, np.float32), "float32")
        monkeypatch.setattr(checkpoint._Shard, "add", Full.add)
        writer.add("v", np.zeros(3, np.float32), "float32")
    assert names(tmp_path) == set()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_the_system_reports_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes that the kernel refuses, not a pretended refusal."""
    real = checkpoint._Shard.__init__

    def onto_full(self: checkpoint._Shard, path: Path, header: int) -> None:
        real(self, path, header)
        self.file.close()
        self.file = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115

    monkeypatch.setattr(checkpoint._Shard, "__init__", onto_full)
    with pytest.raises(OutOfSpaceError):
        write(tmp_path / "model")
    assert names(tmp_path) == set()


def test_a_flush_that_failed_while_more_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system tells it once, to whoever flushes first."""
    real, told = os.fsync, []

    def fsync(descriptor: int) -> None:
        if not told:
            told.append(descriptor)
            raise OSError(errno.ENOSPC, "full")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OutOfSpaceError), CheckpointWriter(tmp_path / "m") as writer:
        for name, (array, dtype) in ARRAYS.items():
            writer.add(name, array, dtype)
            writer.flush()
        writer.commit()
    assert not (tmp_path / "m").exists()


def test_a_place_that_cannot_hold_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        write(tmp_path / "file" / "model")


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/tmp/evil"])
def test_files_stay_inside_the_directory(tmp_path: Path, name: str) -> None:
    with (
        CheckpointWriter(tmp_path / "m") as writer,
        pytest.raises(CheckpointError, match="no file of a model"),
    ):
        writer.write_file(name, "x")


def test_a_link_stays_and_what_it_names_is_replaced(tmp_path: Path) -> None:
    write(tmp_path / "real", marker='{"a": 1}')
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", overwrite=True, marker='{"a": 2}')
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "real" / "config.json").read_text()) == {"a": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_root_is_not_replaced(overwrite: bool) -> None:
    with pytest.raises(TargetExistsError):
        CheckpointWriter(Path("/"), overwrite=overwrite)


def test_a_model_that_could_not_be_replaced_keeps_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old model has made room and the new one cannot take its place."""
    target = tmp_path / "model"
    write(target, marker='{"first": 1}')
    rename = Path.rename

    def fails(self: Path, to: Path) -> Path:
        if to == target and "-old" not in self.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(CheckpointError, match="cannot write"):
        write(target, overwrite=True)
    assert names(tmp_path) == {"model"}
    assert json.loads((target / "config.json").read_text()) == {"first": 1}
    assert_complete(target)


def test_names_that_no_process_gives_are_left_alone(tmp_path: Path) -> None:
    strange = {f".m.partial-{pid}" for pid in ("9" * 20, "²", "-1", "", "x", "0")}
    for name in strange:
        (tmp_path / name).mkdir()
    write(tmp_path / "m")
    assert names(tmp_path) == {"m", *strange}
