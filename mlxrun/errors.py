"""Every expected failure of mlxrun, as one tree.

::

    MlxrunError                           the root: catch this one
    ├── ConversionError                   (converters.errors)
    │   ├── GGUFError                     malformed file: field, byte offset, expected, found
    │   ├── UnsupportedArchitectureError  an unknown model family
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
    ├── ContextLengthError                more tokens than the model's context
    ├── NumericError                      a model that computes infinities or NaN
    ├── KernelsError                      block kernels that cannot be used as asked
    ├── CacheError                        an operation that this kind of cache cannot do
    ├── QueueFullError                    more requests than may wait
    ├── MemoryLimitError                  more memory than there can be: needed and available bytes
    ├── EngineClosedError                 a request to an engine that has been closed
    ├── ProcessError                      a model in another process than the one that loaded it
    ├── BaselineError                     another runtime to measure against is missing, or fails
    ├── PictureError                      measurements that cannot be plotted to a file
    ├── DatasetError                      a data set that cannot be read: line and problem
    ├── ConversationError                 (mlxrun.cli.conversation)
    └── MissingExtraError                 an optional package is not installed: how to install it
"""

from __future__ import annotations

from pathlib import Path

from converters.errors import AdapterError as AdapterError
from converters.errors import CheckpointError as CheckpointError
from converters.errors import ConversionError as ConversionError
from converters.errors import GGUFError as GGUFError
from converters.errors import InexactError as InexactError
from converters.errors import MlxrunError as MlxrunError
from converters.errors import OutOfSpaceError as OutOfSpaceError
from converters.errors import TargetExistsError as TargetExistsError
from converters.errors import UnsupportedArchitectureError as UnsupportedArchitectureError
from converters.errors import shortened


class SourceError(MlxrunError):
    """There is no usable model where the user points."""


class HubError(SourceError):
    """The model hub refused, cannot be reached, or has no such file."""


class ParameterError(MlxrunError):
    """A value is outside its allowed range.

    Args:
        allowed: the range in words, such as ``"between 0 and 1"``.
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
    """A request needs more tokens than the model's context or the cache has room for."""


class NumericError(MlxrunError):
    """A model computes infinities or NaN, so that no token can be sampled."""


class KernelsError(MlxrunError):
    """Block kernels cannot be used as asked: no such instructions, an unsafe cache directory."""


class CacheError(MlxrunError):
    """An operation that this kind of cache cannot do, such as truncating past its window."""


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
        what: needs it.
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
    """Bytes, so exact that a need a little above the limit does not look like the limit."""
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
    """Measurements that cannot be plotted to a file."""


class DatasetError(MlxrunError):
    """A file of prompts and outputs that cannot be read.

    Args:
        line: from 1; None for the file as a whole.
        found: the problem.
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
        feature: that needs it.
        package: which is missing.
        extra: of mlxrun that installs it.
    """

    def __init__(self, feature: str, package: str, extra: str) -> None:
        self.package, self.extra = package, extra
        super().__init__(
            f"{feature} needs {package}, which is not installed",
            hint=f"Install it: pip install 'mlxrun[{extra}]'",
        )
