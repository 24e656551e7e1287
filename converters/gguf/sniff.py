"""Recognize files that are not GGUF by their first bytes, for error messages."""

from __future__ import annotations

from typing import Final

from converters.gguf.types import show

__all__ = ["describe"]

_OLD = "Convert the model again with a current tool"
_WEB = "The download fetched a web page: check the link, and whether it needs a login"
_DIRECTORY = "Give the directory that holds it together with config.json"

#: First bytes -> (what they are of, what to do).
_SIGNATURES: Final[tuple[tuple[bytes, str, str], ...]] = (
    (b"FUGG", "a byte-swapped GGUF file", "Download the little-endian file of this model"),
    (b"lmgg", "a GGML file, from before GGUF", _OLD),
    (b"fmgg", "a GGMF file, from before GGUF", _OLD),
    (b"tjgg", "a GGJT file, from before GGUF", _OLD),
    (b"algg", "a GGLA adapter, from before GGUF", _OLD),
    (b"PK\x03\x04", "a zip archive, as PyTorch checkpoints are", "Convert the model to GGUF first"),
    (b"\x80\x02", "a Python pickle", "Convert the model to GGUF first"),
    (b"\x1f\x8b", "a gzip archive", "Unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "Unpack it first"),
    (b"version https://git-lfs", "a git-lfs pointer", "Fetch the file it stands for: git lfs pull"),
    (b"<!doctype", "an HTML page", _WEB),
    (b"<html", "an HTML page", _WEB),
    (b"<?xml", "an XML document", _WEB),
    (b"{", "a JSON document", "Check the link that it came from"),
    (
        b"\x00\x00\x00\x00",
        "zero bytes",
        "The download reserved the space and stopped: fetch it again",
    ),
)


def describe(start: bytes) -> tuple[str, str]:
    """What the first bytes look like, and what to do about it."""
    if start[8:9] == b"{" and len(start) > 9:
        return "a safetensors file", _DIRECTORY
    text = start.lstrip()
    for signature, what, hint in _SIGNATURES:
        if start.startswith(signature) or text[: len(signature)].lower() == signature:
            return what, hint
    return show(start[:4]), "This is no GGUF file, whatever its name: check which file it should be"
