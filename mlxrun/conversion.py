"""Sources that users name, brought to the converter and to the tokenizer."""

from __future__ import annotations

from pathlib import Path

from converters.convert import Progress
from converters.convert import convert as convert_file
from converters.report import ConversionReport
from mlxrun.hub import resolve
from mlxrun.text.tokenizer import Tokenizer
from mlxrun.text.tokenizer import load_tokenizer as read_tokenizer


def convert(
    src: str | Path,
    dst: str | Path | None = None,
    *,
    policy: str = "near",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert a GGUF file to a model directory that mlxrun and stock mlx-lm load.

    Args:
        src: a ``.gguf`` file, a shard of a split one, or ``org/repo:QUANT`` on the hub.
        dst: directory to create; by default ``NAME-mlx`` in the working directory.
        policy: ``exact``, ``near`` or ``compact``; see ``converters.policy``.
        overwrite: replace an existing model directory once the new one is complete.
        progress: called with (bytes read, bytes in all, tensor name).

    Raises:
        MlxrunError: one of its subclasses says what is wrong.
    """
    return convert_file(resolve(src), dst, policy=policy, overwrite=overwrite, progress=progress)


def load_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer of a model, or of a GGUF that holds nothing but a vocabulary.

    Args:
        source: as :func:`mlxrun.load` takes it.

    Raises:
        MlxrunError: one of its subclasses says what is wrong.
    """
    return read_tokenizer(resolve(source))
