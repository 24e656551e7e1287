"""The root of every expected failure, and the failures of reading and converting weights.

The lowest package owns the root so that ``converters`` never imports ``mlxrun``. The whole tree is
shown in ``mlxrun/errors.py``.
"""

from __future__ import annotations

from pathlib import Path

# A message may quote a file, and a file may hold anything.
LONGEST_MESSAGE = 2000


class MlxrunError(Exception):
    """An expected failure: the problem, its place, and a remedy.

    ``str(error)`` is a single line that the command line prints as it stands.

    Args:
        message: the problem and its place.
        hint: a remedy, as a sentence; None if there is none.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = shortened(" ".join(message.split()))
        self.hint = " ".join(hint.split()) if hint else None
        super().__init__(f"{self.message}. {self.hint}" if self.hint else self.message)


def shortened(text: str, most: int = LONGEST_MESSAGE) -> str:
    """The text, cut to ``most`` characters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


class ConversionError(MlxrunError):
    """Weights could not be read, repacked or written."""


class GGUFError(ConversionError):
    """A GGUF file is malformed or says something impossible.

    Args:
        path: the file.
        field: the header field, metadata key or tensor that is wrong.
        offset: the byte offset in the file where that field is stored.
        expected: the content of a valid file there.
        found: the content of this file there.
    """

    def __init__(
        self,
        path: str | Path,
        field: str,
        offset: int,
        expected: str,
        found: str,
        hint: str | None = None,
    ) -> None:
        self.path = Path(path)
        self.field = field
        self.offset = offset
        self.expected = expected
        self.found = found
        super().__init__(
            f"{self.path.name}: {field} at byte {offset}: expected {expected}, found {found}",
            hint=hint,
        )


class UnsupportedArchitectureError(ConversionError):
    """The file names a model architecture that this project does not know."""


class InexactError(ConversionError):
    """Some tensors have no MLX form that the policy allows.

    ``tensors`` lists them as ``(name, GGML type, reason)``.
    """

    def __init__(self, tensors: list[tuple[str, str, str]], *, hint: str | None = None) -> None:
        self.tensors = tensors
        shown = "; ".join(f"{name} ({kind}): {why}" for name, kind, why in tensors[:8])
        more = f"; and {len(tensors) - 8} more" if len(tensors) > 8 else ""
        super().__init__(f"{len(tensors)} tensors have no exact MLX form: {shown}{more}", hint=hint)


class CheckpointError(ConversionError):
    """A model directory is incomplete, unreadable or contradicts itself."""


class AdapterError(ConversionError):
    """An adapter is damaged, of an unknown kind, or was made for another model."""


class TargetExistsError(ConversionError):
    """The place to write to is taken."""


class OutOfSpaceError(ConversionError):
    """The disk has too little free space."""
