"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from converters.staging import follow, staged, sync_folder

# Of files that no other user may read.
_PRIVATE = 0o600


@contextmanager
def replacing(path: Path, ending: str = "", *, mode: int = _PRIVATE) -> Iterator[Path]:
    """A new file for the block to fill, which takes the path's name at the end of the block.

    An exception in the block leaves the old file as it was.

    Args:
        ending: of the new file's own name, for writers that go by it.
        mode: who may read and write it.

    Raises:
        OSError: it cannot be written, the path is of something other than a regular file, or of
            another user's link in a folder that any user can write to.
    """
    check_regular(path)
    path = follow(path)  # a link stays one
    with staged(path, ending=ending) as partial:
        if mode != _PRIVATE:
            partial.chmod(mode)
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        check_regular(path)
        partial.replace(path)
    sync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove a file that :func:`replacing` would replace, if there is one.

    Raises:
        OSError: it cannot be removed.
    """
    follow(path).unlink(missing_ok=True)


def check_regular(path: Path) -> None:
    """Whether a path is of a regular file, or of nothing yet.

    Raises:
        OSError: it is a directory, a device, a pipe or a socket, or cannot be examined.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a directory", str(path))
    if not stat.S_ISREG(mode):
        what = "it is a device, a pipe or a socket, not a regular file"
        raise FileExistsError(errno.EEXIST, what, str(path))


def check_writable(path: Path) -> None:
    """Whether a path can be written by :func:`replacing` now.

    Raises:
        OSError: it cannot.
    """
    check_regular(path)
    tempfile.TemporaryFile(dir=follow(path).parent).close()
