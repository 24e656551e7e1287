"""The checkpoint writer: what others read back, and what is left when it fails."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from converters.errors import CheckpointError, OutOfSpaceError, TargetExistsError
from converters.huggingface import writer as checkpoint
from converters.huggingface.writer import CheckpointWriter

ARRAYS = {
    "a.weight": (np.arange(12, dtype=np.uint32).reshape(3, 4), "uint32"),
    "a.scales": (np.array([[0.5], [1.5], [-2.0]], np.float16), "float16"),
    "b.weight": (np.array([0x3F80, 0xC000], np.uint16), "bfloat16"),  # 1 and -2
    "c.weight": (np.array([1e-30, 3.5], np.float32), "float32"),
    "d.scales": (np.array([[1, 2, 255]], np.uint8), "uint8"),
}


def write(path: Path, *, overwrite: bool = False, marker: str = "{}", report: str = "{}") -> None:
    """A checkpoint; its report does not list the files, as those of the first versions do not."""
    with CheckpointWriter(path, overwrite=overwrite) as writer:
        for name, (array, dtype) in ARRAYS.items():
            writer.add(name, array, dtype)
        writer.write_file("config.json", marker)
        writer.write_file("conversion.json", report)
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
        "conversion.json",
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
        with pytest.raises(TargetExistsError, match=r"was not replaced: it (has no|is no)"):
            write(path, overwrite=True)
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "meow"
    assert (tmp_path / "file").read_text() == "text"


LISTED = json.dumps(
    {"files": ["config.json", "conversion.json", "additional_chat_templates/a.jinja"]}
)


@pytest.mark.parametrize("report", ["{}", LISTED, "broken", '{"files": 3}'])
@pytest.mark.parametrize(
    "precious",
    [
        "talk.json", "eval_results.json", "my-finetuned.safetensors", "README.md", "notes.txt",
        "model-00001-of-00009.safetensors", "adapters.safetensors", "src/", ".git/config",
        "additional_chat_templates/mine.txt", "config.json.bak",
    ],
)  # fmt: skip
def test_what_no_conversion_wrote_keeps_a_model_from_being_replaced(
    tmp_path: Path, precious: str, report: str
) -> None:
    write(tmp_path / "model", marker='{"first": 1}', report=report)
    mine = tmp_path / "model" / precious
    if precious.endswith("/"):
        mine.mkdir()
    else:
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("mine")
    # A folder that no conversion made is named itself.
    named = precious.rstrip("/") if precious.startswith("additional") else precious.split("/")[0]
    shown = rf"was not replaced: it holds {named.split('/')[0]}.*, which no conversion wrote"
    with pytest.raises(TargetExistsError, match=shown):
        write(tmp_path / "model", overwrite=True)
    assert mine.is_dir() or mine.read_text() == "mine"
    assert json.loads((tmp_path / "model" / "config.json").read_text()) == {"first": 1}


def test_what_finder_leaves_keeps_no_model_from_being_replaced(tmp_path: Path) -> None:
    write(tmp_path / "model", marker='{"first": 1}')
    for name in (".DS_Store", "._config.json", "._model.safetensors"):
        (tmp_path / "model" / name).write_bytes(b"\0" * 8)
    write(tmp_path / "model", overwrite=True, marker='{"second": 2}')
    assert json.loads((tmp_path / "model" / "config.json").read_text()) == {"second": 2}
    (tmp_path / "model" / "._mine").write_text("mine")
    with pytest.raises(TargetExistsError, match=r"it holds \._mine"):
        write(tmp_path / "model", overwrite=True)


def test_a_model_of_another_tool_is_not_replaced(tmp_path: Path) -> None:
    write(tmp_path / "model")
    (tmp_path / "model" / "conversion.json").unlink()
    with pytest.raises(TargetExistsError, match=r"it has no conversion\.json"):
        write(tmp_path / "model", overwrite=True)
    assert_complete(tmp_path / "model")


@pytest.mark.parametrize("report", ["{}", LISTED])
def test_what_a_conversion_wrote_is_replaced(tmp_path: Path, report: str) -> None:
    write(tmp_path / "model", report=report)
    kept = ["additional_chat_templates/a.jinja"]
    kept += ["tokenizer.json", "LICENSE.txt", "merges.txt"] if report == "{}" else []
    for name in kept:
        (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_text("{}")
    write(tmp_path / "model", overwrite=True)
    assert_complete(tmp_path / "model")
    assert "additional_chat_templates" not in names(tmp_path / "model")


def test_a_file_that_appears_while_a_model_is_made_is_not_lost(tmp_path: Path) -> None:
    write(tmp_path / "model")
    with (
        pytest.raises(TargetExistsError, match=r"holds talk\.json"),
        CheckpointWriter(tmp_path / "model", overwrite=True) as writer,
    ):
        (tmp_path / "model" / "talk.json").write_text("mine")
        writer.commit()
    assert names(tmp_path) == {"model"}
    assert (tmp_path / "model" / "talk.json").read_text() == "mine"


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
    """The system reports it once, to the first flush."""
    real, reported = os.fsync, []

    def fsync(descriptor: int) -> None:
        if not reported:
            reported.append(descriptor)
            raise OSError(errno.ENOSPC, "full")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OutOfSpaceError), CheckpointWriter(tmp_path / "m") as writer:
        for name, (array, dtype) in ARRAYS.items():
            writer.add(name, array, dtype)
            writer.flush()
        writer.commit()
    assert not (tmp_path / "m").exists()


def test_all_of_a_model_is_flushed_before_its_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, flushed = os.fsync, []

    def fsync(descriptor: int) -> None:
        flushed.append((os.fstat(descriptor).st_ino, (tmp_path / "m").exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with CheckpointWriter(tmp_path / "m") as writer:
        for name, (array, dtype) in ARRAYS.items():
            writer.add(name, array, dtype)
        writer.write_file("config.json", "{}")
        writer.write_file("folder/notes.txt", "x")
        writer.commit()
    made = [tmp_path / "m", *(tmp_path / "m").rglob("*")]
    assert {(path.stat().st_ino, False) for path in made} <= set(flushed)
    assert flushed[-1] == (tmp_path.stat().st_ino, True)


def test_another_users_link_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")

    def follow(path: Path) -> Path:
        raise PermissionError(errno.EACCES, "it is a link of another user", str(path))

    monkeypatch.setattr(checkpoint, "follow", follow)
    with pytest.raises(CheckpointError, match=r"cannot write .*link: it is a link of another"):
        CheckpointWriter(tmp_path / "link", overwrite=True)


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
