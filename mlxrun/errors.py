"""Every expected failure of mlxrun, as one tree.

::

    MlxrunError                           the root: catch this one
    ├── ConversionError                   (converters.errors)
    │   ├── GGUFError                     malformed file: field, byte offset, expected, found
    │   ├── UnsupportedArchitectureError  a model family that nothing here knows
    │   ├── InexactError                  policy "exact" cannot be kept: the list of tensors
    │   ├── CheckpointError               a model directory that is incomplete or contradictory
    │   ├── AdapterError                  an adapter that is damaged or made for another model
    │   ├── TargetExistsError             the output is already there
    │   └── OutOfSpaceError               the disk is full
    ├── SourceError                       no model where the user points
    │   └── HubError                      the hub refused, is unreachable, or has no such file
    ├── ParameterError                    a value outside its allowed range
    ├── TokenizerError                    a vocabulary that cannot be used
    ├── TemplateError                     a chat template that fails or runs away
    ├── ContextLengthError                more tokens than the model can hold
    ├── NumericError                      a model whose output is no number
    ├── KernelsError                      block kernels that cannot be used as asked
    ├── CacheError                        an operation that this kind of cache cannot do
    ├── QueueFullError                    more requests than may wait
    ├── MemoryLimitError                  more memory than there can be: needed and available bytes
    ├── EngineClosedError                 a request to an engine that has been closed
    ├── ProcessError                      a model in another process than the one that loaded it
    ├── BaselineError                     another runtime to measure against is missing, or fails
    ├── PictureError                      measurements that cannot be drawn into a file
    ├── DatasetError                      a data set that cannot be read: line, and what is wrong
    └── MissingExtraError                 an optional package is not installed: how to install it
"""

from __future__ import annotations

from pathlib import Path

from converters.errors import (
    AdapterError,
    CheckpointError,
    ConversionError,
    GGUFError,
    InexactError,
    MlxrunError,
    OutOfSpaceError,
    TargetExistsError,
    UnsupportedArchitectureError,
    shortened,
)

__all__ = [
    "AdapterError",
    "BaselineError",
    "CacheError",
    "CheckpointError",
    "ContextLengthError",
    "ConversionError",
    "DatasetError",
    "EngineClosedError",
    "GGUFError",
    "HubError",
    "InexactError",
    "KernelsError",
    "MemoryLimitError",
    "MissingExtraError",
    "MlxrunError",
    "NumericError",
    "OutOfSpaceError",
    "ParameterError",
    "PictureError",
    "ProcessError",
    "QueueFullError",
    "SourceError",
    "TargetExistsError",
    "TemplateError",
    "TokenizerError",
    "UnsupportedArchitectureError",
]


class SourceError(MlxrunError):
    """There is no usable model where the user points."""


class HubError(SourceError):
    """The model hub refused, cannot be reached, or has no such file."""


class ParameterError(MlxrunError):
    """A value is outside its allowed range.

    Args:
        name: the parameter.
        value: what was given.
        allowed: the allowed range in words, e.g. ``"between 0 and 1"``.
    """

    def __init__(self, name: str, value: object, allowed: str) -> None:
        self.name = name
        self.value = value
        self.allowed = allowed
        super().__init__(f"{name} must be {allowed}, not {shortened(repr(value), 100)}")


class TokenizerError(MlxrunError):
    """A vocabulary is missing, damaged or of a kind that cannot be used."""


class TemplateError(MlxrunError):
    """A chat template does not parse, fails, or exceeds its limits."""


class ContextLengthError(MlxrunError):
    """A request needs more tokens than the model or the cache can hold."""


class NumericError(MlxrunError):
    """A model computes infinities or not-a-number, so that no token can be chosen."""


class KernelsError(MlxrunError):
    """Block kernels cannot be used as asked: no such instructions, an unsafe cache directory."""


class CacheError(MlxrunError):
    """An operation that this kind of cache cannot do, such as trimming past its window."""


class QueueFullError(MlxrunError):
    """As many requests wait as may; ``limit`` says how many."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        super().__init__(
            f"{limit} requests are waiting already", hint="Try again when some have ended"
        )


class MemoryLimitError(MlxrunError):
    """Something needs more memory than there can be.

    Args:
        needed, available: bytes.
        what: what needs it.
        hint: what to do.
    """

    def __init__(
        self,
        needed: int,
        available: int,
        what: str = "this",
        hint: str = "Use a shorter context, fewer sequences at once or a smaller model",
    ) -> None:
        self.needed, self.available = needed, available
        super().__init__(
            f"{what} needs {_size(needed)}, and {_size(available)} are available", hint=hint
        )


def _size(nbytes: float) -> str:
    """Bytes for people, so exact that what does not fit by a little is seen not to."""
    amount, unit = nbytes / 1e6, "MB"
    for larger in ("GB", "TB"):
        if amount >= 10_000:
            amount, unit = amount / 1000, larger
    return f"{amount:.1f} {unit}"


class EngineClosedError(MlxrunError):
    """The engine has been closed and takes no more requests."""


class ProcessError(MlxrunError):
    """A model cannot be used in, or sent to, another process than the one that loaded it."""


class BaselineError(MlxrunError):
    """Another runtime to measure against is missing, or fails."""


class PictureError(MlxrunError):
    """What was measured cannot be drawn into a file."""


class DatasetError(MlxrunError):
    """A file of prompts and outputs has something else in it.

    Args:
        path: the file.
        line: where, from 1; None where it is the file as a whole.
        found: what is wrong there.
        hint: what the user can do.
    """

    def __init__(
        self, path: str | Path, line: int | None, found: str, *, hint: str | None = None
    ) -> None:
        self.path, self.line = Path(path), line
        where = self.path.name if line is None else f"{self.path.name}, line {line}"
        super().__init__(f"{where}: {found}", hint=hint)


class MissingExtraError(MlxrunError):
    """Something needs a package that an extra of mlxrun installs.

    Args:
        wanted: what needs it.
        package: which is missing.
        extra: of mlxrun that installs it.
    """

    def __init__(self, wanted: str, package: str, extra: str) -> None:
        self.package, self.extra = package, extra
        super().__init__(
            f"{wanted} needs {package}, which is not installed",
            hint=f"Install it: pip install 'mlxrun[{extra}]'",
        )
