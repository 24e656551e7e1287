"""What is not a GGUF file at all: the error says what it looks like, or why it cannot be read."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from gguf_builder import llama

from converters.errors import GGUFError
from converters.gguf.reader import read_gguf


def refused(path: Path) -> GGUFError:
    with pytest.raises(GGUFError) as caught:
        read_gguf(path)
    return caught.value


LOOKS: dict[str, tuple[bytes, str]] = {
    "safetensors": (struct.pack("<Q", 60) + b'{"__metadata__":{}}', "a safetensors file"),
    "zip": (b"PK\x03\x04rest", "a zip archive"),
    "pickle": (b"\x80\x02}q\x00", "a Python pickle"),
    "html": (b"\n<!DOCTYPE html><html>", "an HTML page"),
    "html without doctype": (b"<HTML><body>", "an HTML page"),
    "xml": (b"<?xml version='1.0'?><Error>", "an XML document"),
    "json": (b'{"error": "not found"}', "a JSON document"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a git-lfs pointer"),
    "ggml": (struct.pack("<I", 0x67676D6C) + bytes(9), "a GGML file"),
    "ggjt": (struct.pack("<I", 0x67676A74) + bytes(9), "a GGJT file"),
    "zeros": (bytes(100), "zero bytes"),
    "gzip": (b"\x1f\x8b\x08", "a gzip archive"),
    "swapped": (b"FUGG" + bytes(20), "a byte-swapped GGUF"),
    "other": (b"ELF\x7f and so on", r"b'ELF\x7f'"),
    "lower case": (b"gguf" + bytes(20), "b'gguf'"),
}


@pytest.mark.parametrize("name", LOOKS)
def test_other_formats(tmp_path: Path, name: str) -> None:
    content, found = LOOKS[name]
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    error = refused(path)
    assert (error.field, error.offset, error.expected) == ("magic", 0, "the bytes 'GGUF'")
    assert found in error.found
    assert error.hint


def test_nothing_to_read(tmp_path: Path) -> None:
    empty, folder, pipe = tmp_path / "empty.gguf", tmp_path / "folder.gguf", tmp_path / "pipe.gguf"
    empty.touch()
    folder.mkdir()
    os.mkfifo(pipe)
    for path, found in (
        (tmp_path / "absent.gguf", "nothing at this path"),
        (empty, "an empty file"),
        (folder, "a directory"),
        (pipe, "something that is not a regular file"),
        (empty / "below.gguf", "cannot be read"),
        (tmp_path / ("n" * 300), "cannot be read"),
        (tmp_path / "a\0b", "cannot be read"),
    ):
        error = refused(path)
        assert (error.field, error.offset, error.expected) == ("file", 0, "a GGUF file")
        assert found in error.found


def test_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "locked.gguf"
    path.write_bytes(llama().build())

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)  # root may read whatever the mode says
    assert "Permission denied" in refused(path).found
