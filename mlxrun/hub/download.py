"""Brings files of repositories into huggingface_hub's own cache.

Settings are huggingface_hub's: ``HF_HOME``, ``HF_TOKEN``, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``.
Large files are downloaded here, to where huggingface_hub looks for them, because its own download
discards an interrupted part and does not verify hashes. Over plain HTTP a part is a prefix of the
file: ``blobs/SHA256.incomplete``, renamed once the hash is right. A branch or tag is recorded last,
so that offline it leads to complete models only.
"""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock, build_hf_headers  # type: ignore[attr-defined]

from mlxrun.errors import HubError, OutOfSpaceError
from mlxrun.hub.choice import Choice, HubFile, size_text
from mlxrun.hub.client import patiently, unobtrusive
from mlxrun.hub.failures import FAILURES, TRANSPORT, is_transient, translate
from mlxrun.hub.listing import Listing, folder
from mlxrun.hub.names import HubName

Progress = Callable[[int, int], None]

_LARGEST = 50_000_000_000  # bytes that the hub serves over plain HTTP


def bytes_to_fetch(name: HubName, listing: Listing, choice: Choice) -> int:
    """Bytes that :func:`fetch` would download; partial files count as present."""
    return sum(file.size - _here(name, file) for file in _missing(name, listing, choice))


def fetch(name: HubName, listing: Listing, choice: Choice, progress: Progress | None) -> Path:
    """Download the chosen files that are not in the cache.

    Args:
        progress: called with (bytes present, total bytes) during a download.

    Returns:
        The file to open, or the directory.

    Raises:
        OutOfSpaceError: not enough disk space.
        HubError: a file cannot be downloaded, or does not match the hub's hash.
    """
    missing = _missing(name, listing, choice)
    _check_space(name, bytes_to_fetch(name, listing, choice))
    done = choice.size - sum(file.size for file in missing)
    with unobtrusive():
        for file in missing:
            try:
                _fetch_file(name, listing.commit, file, _meter(progress, done, choice.size))
            except FAILURES as error:
                raise translate(error, name, file.path) from error
            done += file.size
    if listing.problem is None:
        with suppress(OSError):  # a read-only cache serves as well
            _record(name, listing.commit)
    return _snapshot(name, listing) / choice.first


def _snapshot(name: HubName, listing: Listing) -> Path:
    return folder(name.repo) / "snapshots" / listing.commit


def _missing(name: HubName, listing: Listing, choice: Choice) -> list[HubFile]:
    snapshot = _snapshot(name, listing)
    return [file for file in choice.files if not _whole(snapshot / file.path, file)]


def _whole(path: Path, file: HubFile) -> bool:
    """Whether a file is there and complete."""
    return path.exists() and (not file.sha256 or path.stat().st_size == file.size)


def _here(name: HubName, file: HubFile) -> int:
    """Bytes of a missing file that are in the cache under its hash or as a part."""
    if not file.sha256:
        return 0
    blob = folder(name.repo) / "blobs" / file.sha256
    return min(file.size, max(_size(blob), _size(blob.with_name(f"{blob.name}.incomplete"))))


def _fetch_file(name: HubName, commit: str, file: HubFile, meter: Callable[[int], None]) -> None:
    """Download one file, verified if the hub knows its SHA-256."""
    meter(0)
    verified = None
    if file.sha256 and file.size <= _LARGEST:
        verified = _fetch_blob(name, commit, file, file.sha256, meter)
    # Finds the blob and links to it; fetches whatever is not there.
    path = Path(hf_hub_download(name.repo, file.path, revision=commit, endpoint=constants.ENDPOINT))
    blob = path.resolve()
    if file.sha256 and blob != verified and _hash(blob) != file.sha256:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise _damaged(name, file)
    meter(file.size)


def _fetch_blob(
    name: HubName, commit: str, file: HubFile, sha256: str, meter: Callable[[int], None]
) -> Path:
    """Complete ``blobs/SHA256.incomplete``, check it, and rename it to ``blobs/SHA256``."""
    blob = folder(name.repo) / "blobs" / sha256
    partial = blob.with_name(f"{sha256}.incomplete")
    lock = Path(constants.HF_HUB_CACHE, ".locks", blob.parts[-3], f"{sha256}.lock")
    for directory in (blob.parent, lock.parent):
        directory.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if _whole(blob, file):
            return blob.resolve()
        if blob.exists():  # cut short by a crash
            blob.replace(partial)
        if _size(partial) > file.size:  # not a prefix of this file
            partial.unlink()
        resumed = _size(partial) > 0
        _stream(name, commit, file, partial, meter)
        while _hash(partial) != sha256:
            partial.unlink()
            if not resumed:
                raise _damaged(name, file)
            resumed = False  # the earlier part may be damaged: once more, from the start
            _stream(name, commit, file, partial, meter)
        return partial.rename(blob).resolve()


def _stream(
    name: HubName, commit: str, file: HubFile, partial: Path, meter: Callable[[int], None]
) -> None:
    """Append the rest of a file, as long as every attempt brings some bytes."""
    url = hf_hub_url(name.repo, file.path, revision=commit, endpoint=constants.ENDPOINT)
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    partial.touch()
    while (before := _size(partial)) < file.size:
        try:
            with _Partial(partial, meter) as sink:
                patiently(
                    lambda: http_get(
                        url, sink, resume_size=before, headers=headers, expected_size=file.size
                    )
                )
        except TRANSPORT as error:
            if not is_transient(error) or _size(partial) <= before:
                raise


class _Partial(io.BufferedWriter):
    """A file that is appended to and reports its length."""

    def __init__(self, path: Path, meter: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self._meter = meter

    def write(self, data: bytes | bytearray | memoryview, /) -> int:  # type: ignore[override]
        written = super().write(data)
        self._meter(self.tell())
        return written


def _check_space(name: HubName, needed: int) -> None:
    """Refuse a download that does not fit on the disk."""
    cache = Path(constants.HF_HUB_CACHE)
    try:
        existing = next(path for path in (cache, *cache.parents) if path.exists())
        free = shutil.disk_usage(existing).free
    except OSError as error:
        raise translate(error, name) from error
    if needed > free:
        raise OutOfSpaceError(
            f"{name} needs {size_text(needed)} and {existing} has {size_text(free)} free",
            hint="Free some space or set HF_HOME to another disk",
        )


def _record(name: HubName, commit: str) -> None:
    """Record the commit of a branch or tag, as huggingface_hub does."""
    ref = folder(name.repo) / "refs" / name.revision
    if name.revision != commit and not (ref.is_file() and ref.read_text() == commit):
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)


def _meter(progress: Progress | None, done: int, total: int) -> Callable[[int], None]:
    """Progress of one file as progress of all."""

    def report(position: int) -> None:
        if progress:
            progress(done + position, total)

    return report


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(name: HubName, file: HubFile) -> HubError:
    return HubError(
        f"{file.path} of {name.repo} arrived damaged (not the hub's SHA-256) and was removed",
        hint="Run it again; if it fails again, the mirror or proxy alters files",
    )
