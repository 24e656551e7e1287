"""The small files beside the weights: those that a converted directory keeps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from converters.errors import CheckpointError

# Tokenizers and how to use them. Never weights, never code.
_KEPT = (
    "tokenizer*.json",
    "tokenizer*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)


def companions(path: Path) -> Iterator[tuple[str, bytes]]:
    """Names, relative to the directory, and contents of the files to keep.

    Raises:
        CheckpointError: one cannot be read.
    """
    for file in companion_files(path):
        try:
            yield file.relative_to(path).as_posix(), file.read_bytes()
        except OSError as error:
            raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error


def companion_files(path: Path) -> list[Path]:
    """The files of a directory to keep."""
    return sorted({file for pattern in _KEPT for file in path.glob(pattern) if file.is_file()})
