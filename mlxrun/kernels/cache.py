"""A private directory of compiled objects, each verified by its hash before it is loaded.

The hash is in a file of its own; both are renamed into place, the hash last.
"""

from __future__ import annotations

import fcntl
import grp
import hashlib
import os
import pwd
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from converters.staging import staged, sync_folder
from mlxrun.errors import KernelsError
from mlxrun.files import replacing

__all__ = ["ObjectCache", "digest", "place"]

_PRIVATE = 0o700
_LOCK = "lock"
_OLD = 60 * 24 * 3600.0  # seconds; other environments may use younger ones
# In a container, the owner of files of the root outside.
_ROOT, _UNMAPPED = 0, 65534


def place() -> Path:
    """The user's directory for compiled objects.

    Raises:
        KernelsError: there is no home directory.
    """
    if sys.platform == "darwin":
        return _home() / "Library" / "Caches" / "mlxrun" / "kernels"
    named = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(named) if named.startswith("/") else _home() / ".cache"  # as the standard has it
    return root / "mlxrun" / "kernels"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError as error:
        raise KernelsError("there is no home directory to keep compiled kernels in") from error


def digest(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ObjectCache:
    """A directory that only its user can write to; made where it is missing.

    Raises:
        KernelsError: another user could write to it, or it cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
            # Links on the way are followed once, and their targets are checked.
            self.folder = folder.parent.resolve() / folder.name
            _check_private(self.folder)
        except OSError as error:
            why = error.strerror or str(error)
            raise KernelsError(f"{folder}, for compiled kernels: {why}") from error

    def find(self, name: str) -> Path | None:
        """The intact object of that name, or None."""
        path = self.folder / f"{name}.so"
        with suppress(OSError):
            if _record(path).read_text(encoding="ascii").strip() == digest(path):
                return path
        return None

    def matching(self, pattern: str) -> Path | None:
        """The newest intact object whose name matches a pattern, or None."""
        with suppress(OSError):
            paths = sorted(self.folder.glob(f"{pattern}.so"), key=lambda path: path.stat().st_mtime)
            return next(filter(None, (self.find(path.stem) for path in reversed(paths))), None)
        return None

    def add(self, name: str, made: Path) -> Path:
        """Move an object into the cache; raises OSError."""
        path = self.folder / f"{name}.so"
        with replacing(_record(path)) as partial:
            partial.write_text(digest(made) + "\n", encoding="ascii")
            made.chmod(0o600)
            made.replace(path)
        sync_folder(self.folder)
        return path

    def prune(self, pattern: str, keep: Path) -> None:
        """Remove objects of former sources and versions after 60 days."""
        limit = time.time() - _OLD
        for path in self.folder.glob(f"{pattern}.so"):
            with suppress(OSError):
                if path != keep and path.stat().st_mtime < limit:
                    _record(path).unlink(missing_ok=True)
                    path.unlink()

    @contextmanager
    def workshop(self) -> Iterator[Path]:
        """A temporary directory on the same file system; raises OSError."""
        with staged(self.folder / "workshop", directory=True) as folder:
            folder.chmod(_PRIVATE)
            yield folder

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Wait for the cache's lock, so that two processes do not compile the same objects."""
        descriptor = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            with suppress(OSError):  # no locks on this file system: both compile
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _record(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _check_private(folder: Path) -> None:
    """Raise KernelsError if another user (but root) could write to a directory or replace it."""
    own = folder.lstat()
    if stat.S_ISLNK(own.st_mode) or not stat.S_ISDIR(own.st_mode):
        raise KernelsError(f"{folder}, for compiled kernels, is a link or no directory")
    if own.st_uid != os.geteuid():
        raise KernelsError(f"{folder}, for compiled kernels, belongs to another user")
    if stat.S_IMODE(own.st_mode) & 0o077:
        raise KernelsError(
            f"{folder}, for compiled kernels, is open to other users",
            hint=f"chmod 700 {folder}, if all files there are yours; or remove it",
        )
    for parent in folder.parents:
        status = parent.stat()
        shared = status.st_mode & stat.S_IWOTH or (
            status.st_mode & stat.S_IWGRP and not _is_own_group(status.st_gid)
        )
        if shared and not status.st_mode & stat.S_ISVTX:
            raise KernelsError(
                f"{folder}, for compiled kernels: other users can write to {parent}",
                hint="XDG_CACHE_HOME names another directory for caches",
            )
        if status.st_uid not in (os.geteuid(), _ROOT, _UNMAPPED):
            raise KernelsError(f"{folder}, for compiled kernels: {parent} is another user's")


def _is_own_group(group: int) -> bool:
    """Whether a group is the user's private one."""
    with suppress(KeyError):
        return grp.getgrgid(group).gr_name == pwd.getpwuid(os.geteuid()).pw_name
    return False
