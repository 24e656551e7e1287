"""Files that are written whole or not at all. Knows nothing of what is in them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# What ``tempfile`` gives a file.
_PRIVATE = 0o600


@contextmanager
def replacing(path: Path, ending: str = "", *, mode: int = _PRIVATE) -> Iterator[Path]:
    """A new file beside a path, for the block to fill; it takes the path's name when that is done.

    Whatever else ends the block leaves what was there as it was.

    Args:
        ending: of the new file's own name, for writers that go by it.
        mode: who may read and write it.

    Raises:
        OSError: it cannot be written.
    """
    path = path.resolve()  # a link stays one
    descriptor, name = tempfile.mkstemp(ending, ".mlxrun-", path.parent)
    os.close(descriptor)
    partial = Path(name)
    try:
        if mode != _PRIVATE:
            partial.chmod(mode)
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def check_writable(path: Path) -> None:
    """Whether a file can be written beside a path now.

    Raises:
        OSError: it cannot.
    """
    tempfile.TemporaryFile(dir=path.absolute().parent).close()
