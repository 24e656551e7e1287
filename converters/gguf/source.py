"""A GGUF opened as a model: its tensors mapped to parameters, its metadata to ``config.json``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from converters.gguf.config import Config, hyperparameters
from converters.gguf.names import NameMap, architecture_of, map_tensors
from converters.gguf.reader import GGUFFile, read_gguf
from converters.gguf.regroup import regroup


@dataclass(frozen=True)
class GGUFModel:
    """A GGUF with what its header says, worked out once.

    Attributes:
        file: as it is on disk.
        names: each tensor's parameter.
        config: ``config.json`` in Hugging Face terms, without its ``quantization`` section.
    """

    file: GGUFFile
    names: NameMap
    config: Config


def open_gguf(source: str | Path | GGUFFile) -> GGUFModel:
    """Read and map the header of a GGUF; no tensor is read.

    Raises:
        UnsupportedArchitectureError: the architecture is unknown.
        GGUFError: the header is malformed, a tensor or a hyperparameter is missing, or they
            contradict each other.
    """
    file = source if isinstance(source, GGUFFile) else read_gguf(source)
    architecture = architecture_of(file)
    grouped = regroup(file, architecture)
    return GGUFModel(
        file, map_tensors(grouped, architecture), hyperparameters(grouped, architecture)
    )
