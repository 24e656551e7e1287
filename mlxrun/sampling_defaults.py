"""Sampling parameters that a model's own files recommend.

They are in ``generation_config.json`` of a directory, or ``general.sampling.*`` of a GGUF, and the
defaults of options that a caller leaves out. The others have mlxrun's defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from converters.gguf.sampling import KEYS, decimal
from mlxrun.errors import CheckpointError, ParameterError
from mlxrun.sampling_params import SamplingParams

if TYPE_CHECKING:
    from converters.gguf.reader import GGUFFile

__all__ = ["RECOMMENDABLE", "SamplingDefaults", "read_sampling_defaults"]

# Parameters that a model's files may set: those of transformers' GenerationConfig that exist here,
# and llama.cpp's.
RECOMMENDABLE: Final = frozenset({*KEYS.values(), "typical_p"})
_NAMES: Final = {**KEYS, **{name: name for name in RECOMMENDABLE}}


@dataclass(frozen=True)
class SamplingDefaults:
    """The sampling parameters of requests that name none.

    Attributes:
        params: all of them.
        names: those that the model's files recommend; the others are mlxrun's.
        source: the file that recommends them.
        problems: a line for each value of that file that cannot be used.
    """

    params: SamplingParams = field(default_factory=SamplingParams)
    names: frozenset[str] = frozenset()
    source: str = ""
    problems: tuple[str, ...] = ()

    @classmethod
    def of(cls, source: str, entries: Mapping[str, Any]) -> Self:
        """The defaults of a file.

        Args:
            source: its name, for messages.
            entries: of ``generation_config.json``, or metadata of a GGUF; unknown ones and null are
                ignored.
        """
        values: dict[str, Any] = {}
        problems = []
        for key, value in entries.items():
            name = _NAMES.get(key)
            if name is None or value is None:
                continue
            try:
                values[name] = _checked(name, decimal(value) if key in KEYS else value)
            except ParameterError as error:
                problem = ParameterError(f"{source}: {key}", value, error.allowed)
                problems.append(f"{problem}; mlxrun's default, {_ours(name)}, is used")
        if entries.get("do_sample") is False:
            values["temperature"] = 0.0
        return cls(SamplingParams(**values), frozenset(values), source, tuple(problems))

    @property
    def values(self) -> dict[str, Any]:
        """The recommended ones."""
        return {f.name: getattr(self.params, f.name) for f in fields(self.params)
                if f.name in self.names}  # fmt: skip

    def origin(self, name: str) -> str:
        """Whose a default is: ``"the model's (FILE)"`` or ``"mlxrun's"``."""
        return f"the model's ({self.source})" if name in self.names else "mlxrun's"

    def __str__(self) -> str:
        if not self.names:
            return "mlxrun's own defaults: the model's files recommend none"
        listed = ", ".join(f"{name} {value:g}" for name, value in self.values.items())
        return f"{listed} ({self.source})"


def _checked(name: str, value: Any) -> Any:
    if name == "top_k" and isinstance(value, int) and value == -1:
        value = 0  # -1 is "all" to llama.cpp and vLLM
    return getattr(SamplingParams(**{name: value}), name)


def _ours(name: str) -> Any:
    return getattr(SamplingParams(), name)


def read_sampling_defaults(source: Path | GGUFFile) -> SamplingDefaults:
    """The sampling defaults of a model directory or a GGUF file; unusable ones are ``problems``."""
    if not isinstance(source, Path):
        return SamplingDefaults.of(source.path.name, source.metadata)
    from converters.huggingface.reader import read_object

    file = source / "generation_config.json"
    if not file.is_file():
        return SamplingDefaults()
    try:
        return SamplingDefaults.of(file.name, read_object(file))
    except CheckpointError as error:
        return SamplingDefaults(problems=(str(error),))
