"""Files and directories written under a hidden name and renamed when they are complete.

The writing process holds a lock on the hidden file. One without a lock was left by a killed
process, in this container or another; the next writer into the same folder removes it. Where the
file system has no locks, leftovers stay.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = ".mlxrun-partial-"
# renameat2(2) and fcntl.h of Linux; renamex_np(2) of macOS.
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100
_RENAME_SWAP = 2
# As many as Linux follows.
_MOST_LINKS = 40


@contextmanager
def staged(place: Path, *, directory: bool = False, ending: str = "") -> Iterator[Path]:
    """A new, empty, locked file or directory in the folder of ``place``; removed at the end.

    Args:
        place: the final path; its folder must exist.
        directory: make a directory with the umask's mode; else a file that only its owner reads.
        ending: suffix of the hidden name, for writers that choose a format by it.

    Raises:
        OSError: it cannot be made.
    """
    _sweep(place.parent)
    if directory:
        _restore(place)
    path, lock = _create(place.parent, directory, ending)
    try:
        yield path
    finally:
        _remove(path)
        os.close(lock)


def publish(made: Path, place: Path) -> None:
    """Rename a finished directory to its final path; an old one there takes the hidden name.

    Atomic where the file system can exchange names. Elsewhere ``place`` is absent for a moment, and
    the old directory is at :func:`set_aside`.

    Raises:
        OSError: it cannot be renamed; ``place`` is as it was.
    """
    if not place.exists():
        made.rename(place)
    elif not _exchange(made, place):
        old = set_aside(place)
        place.rename(old)
        try:
            made.rename(place)
        except BaseException:
            _put_back(old, place)
            raise
        _remove(old)
    sync_folder(place.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, where its file system can do that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def follow(path: Path) -> Path:
    """The absolute path that a path leads to, following trusted links.

    As Linux with fs.protected_symlinks: in a sticky folder that all can write to, only links of the
    user and of the folder's owner. This concerns a link as the last part, not folders before it.

    Raises:
        OSError: a link of another user, or a circle of links.
    """
    for _ in range(_MOST_LINKS):
        folder = path.absolute().parent.resolve()
        if not (folder / path.name).is_symlink():
            return (folder / path.name).resolve()
        path = folder / path.name
        shared, owner = folder.stat(), path.lstat().st_uid
        open_to_all = shared.st_mode & stat.S_ISVTX and shared.st_mode & stat.S_IWOTH
        if open_to_all and owner not in (os.geteuid(), shared.st_uid):
            what = "it is a link of another user in a folder that all users can write to"
            raise PermissionError(errno.EACCES, what, str(path))
        path = folder / path.readlink()
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def set_aside(place: Path) -> Path:
    """The old directory's path while a new one takes its name, if they cannot be exchanged."""
    return place.parent / f".{place.name}.mlxrun-old"


def _restore(place: Path) -> None:
    """Rename the user's directory that was set aside back, unless it was replaced."""
    old = set_aside(place)
    with suppress(OSError):  # there is none, or its name would be too long
        status = old.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
            _put_back(old, place)


def _put_back(old: Path, place: Path) -> None:
    if place.exists():
        _remove(old)
    else:
        old.rename(place)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names atomically; False where that cannot be done."""
    import ctypes

    libc = ctypes.CDLL(None)
    first, second = os.fsencode(one), os.fsencode(other)
    try:
        if sys.platform == "darwin":
            return bool(libc.renamex_np(first, second, _RENAME_SWAP) == 0)
        swapped = libc.renameat2(_AT_FDCWD, first, _AT_FDCWD, second, _RENAME_EXCHANGE)
        return bool(swapped == 0)
    except AttributeError:  # an older C library
        return False


def _create(folder: Path, directory: bool, ending: str) -> tuple[Path, int]:
    """A new path and a descriptor that holds its lock."""
    while True:
        path = folder / f"{_PREFIX}{secrets.token_hex(6)}{ending}"
        if directory:
            path.mkdir()
        else:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        lock = _lock(path, needed=False)
        if lock is not None:
            return path, lock


def _lock(path: Path, *, needed: bool) -> int | None:
    """A descriptor that holds a path's lock; None if another process has or removed it.

    Args:
        needed: None also where there are no locks.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if needed or isinstance(error, BlockingIOError):
            os.close(descriptor)
            return None
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
            return descriptor
    os.close(descriptor)
    return None


def _sweep(folder: Path) -> None:
    """Remove leftovers of killed processes from a folder."""
    with suppress(OSError):
        for entry in os.scandir(folder):
            if entry.name.startswith(_PREFIX):
                _remove_if_dead(Path(entry.path))


def _remove_if_dead(path: Path) -> None:
    with suppress(OSError):
        status = path.lstat()
        ours = status.st_uid == os.geteuid()
        if not ours or not (stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode)):
            return
        lock = _lock(path, needed=True)
        if lock is not None:
            _remove(path)
            os.close(lock)


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
