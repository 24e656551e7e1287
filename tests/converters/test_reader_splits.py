"""Split files: a set opens from any shard, and every way of not being a set is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from gguf_builder import ARRAY, BOOL, STRING, U16, U32, Builder, Tensor, llama

from converters.errors import GGUFError
from converters.gguf.reader import read_gguf

NAME = "model-{:05d}-of-{:05d}.gguf"


def shards(tensors: int = 4) -> list[Builder]:
    """The tiny llama in three: the metadata in the first, the tensors spread."""
    whole = llama()
    parts = [whole, Builder(), Builder()]
    parts[1].tensors, parts[2].tensors = whole.tensors[2:3], whole.tensors[3:]
    whole.tensors = whole.tensors[:2]
    for number, part in enumerate(parts):
        part.set("split.no", U16, number).set("split.count", U16, 3)
        part.set("split.tensors.count", U32, tensors)
    return parts


def write(folder: Path, parts: list[Builder]) -> list[Path]:
    paths = [folder / NAME.format(n + 1, len(parts)) for n in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        path.write_bytes(part.build())
    return paths


def refused(path: Path) -> GGUFError:
    with pytest.raises(GGUFError) as caught:
        read_gguf(path)
    return caught.value


@pytest.mark.parametrize("given", [0, 1, 2])
def test_any_shard_opens_the_set(tmp_path: Path, given: int) -> None:
    paths = write(tmp_path, shards())
    file = read_gguf(paths[given])
    assert file.paths == tuple(paths) and file.path == paths[0]
    assert file.architecture == "llama" and file.get("split.no") == 0
    assert [tensor.name for tensor in file.tensors] == [t.name for t in llama().tensors]
    assert [paths.index(tensor.path) for tensor in file.tensors] == [0, 0, 1, 2]
    for tensor in file.tensors:
        stored = tensor.path.read_bytes()[tensor.offset :][: tensor.nbytes]
        assert tensor.raw().tobytes() == stored


def test_metadata_alone_in_the_first_shard(tmp_path: Path) -> None:
    parts = shards()
    parts[1].tensors = parts[0].tensors + parts[1].tensors
    parts[0].tensors = []
    assert len(read_gguf(write(tmp_path, parts)[0]).tensors) == 4


@pytest.mark.parametrize("count", [0, 1])
def test_merged_file_is_not_split(tmp_path: Path, count: int) -> None:
    path = tmp_path / "merged.gguf"
    path.write_bytes(llama().set("split.count", U16, count).build())
    assert read_gguf(path).paths == (path,)


def test_missing_shard(tmp_path: Path) -> None:
    paths = write(tmp_path, shards())
    paths[1].unlink()
    error = refused(paths[0])
    assert (error.path, error.field) == (paths[1], "file")
    assert (error.expected, error.found) == ("shard 2 of 3", "nothing at this path")
    assert error.hint is not None and "Download the missing shard" in error.hint


def test_shard_cut_short(tmp_path: Path) -> None:
    paths = write(tmp_path, shards())
    paths[2].write_bytes(paths[2].read_bytes()[:-2000])
    error = refused(paths[0])
    assert error.path == paths[2] and "fetch it again" in str(error)


def test_renamed_shard(tmp_path: Path) -> None:
    paths = write(tmp_path, shards())
    for name in ("first.gguf", "model-00002-of-00003.gguf", "model-00001-of-00004.gguf"):
        error = refused(paths[0].rename(tmp_path / name))
        paths[0] = tmp_path / name
        assert (error.field, error.found) == ("split.no", repr(name))
        assert error.expected == "a file named ...-00001-of-00003.gguf"


#: What is wrong -> (which shard, how, the key blamed, expected, found).
CASES: dict[str, tuple[int, Callable[[Builder], object], str, str, str]] = {
    "number twice": (1, lambda b: b.set("split.no", U16, 2), "split.no", "1", "2"),
    "number beyond": (0, lambda b: b.set("split.no", U16, 3), "split.no", "from 0 to 2", "3"),
    "no number": (0, lambda b: b.drop("split.no"), "split.no", "an integer", "no such key"),
    "no number later": (2, lambda b: b.drop("split.no"), "split.no", "2", "no such key"),
    "number of another type": (
        0, lambda b: b.set("split.no", STRING, "0"), "split.no", "an integer", "'0'",
    ),
    "number in an array": (
        1, lambda b: b.set("split.no", ARRAY, (U16, [1, 2])), "split.no", "1", "an array of 2",
    ),
    "number as a boolean": (
        1, lambda b: b.set("split.no", BOOL, 1), "split.no", "1", "True",
    ),
    "count in an array": (
        0, lambda b: b.set("split.count", ARRAY, (U16, [])), "split.count", "0 to", "array of 0",
    ),
    "other count": (1, lambda b: b.set("split.count", U16, 4), "split.count", "3", "4"),
    "no count later": (1, lambda b: b.drop("split.count"), "split.count", "3", "no such key"),
    "count of another type": (
        0, lambda b: b.set("split.count", STRING, "3"), "split.count", "from 0 to 99999", "'3'",
    ),
    "absurd count": (
        0, lambda b: b.set("split.count", U32, 2**32 - 1), "split.count", "99999", str(2**32 - 1),
    ),
    "other number of tensors": (
        0, lambda b: b.set("split.tensors.count", U32, 5), "split.tensors.count", "4", "5",
    ),
    "other number of tensors later": (
        2, lambda b: b.set("split.tensors.count", U32, 3), "split.tensors.count", "4", "3",
    ),
    "no number of tensors": (
        0, lambda b: b.drop("split.tensors.count"), "split.tensors.count", "integer", "no such",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_not_a_set(tmp_path: Path, case: str) -> None:
    which, spoil, key, expected, found = CASES[case]
    parts = shards()
    spoil(parts[which])
    paths = write(tmp_path, parts)
    error = refused(paths[0])
    assert (error.path, error.field) == (paths[which], key)
    marks = parts[which].marks
    assert error.offset == marks.get(f"value:{key}", marks["directory"])
    assert expected in error.expected and found in error.found


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    parts = shards(tensors=5)
    parts[2].tensors.append(Tensor("token_embd.weight", [32, 5], 640))
    paths = write(tmp_path, parts)
    error = refused(paths[0])
    assert (error.path, error.field) == (paths[2], "tensor token_embd.weight")
    assert error.offset == parts[2].marks["tensor:token_embd.weight"]
    assert error.found == f"a second one (the first is in {paths[0].name})"


def test_without_optional_count_of_tensors_later(tmp_path: Path) -> None:
    parts = shards()
    parts[1].drop("split.tensors.count")
    assert len(read_gguf(write(tmp_path, parts)[0]).tensors) == 4
