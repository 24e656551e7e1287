"""Brings files of repositories into huggingface_hub's own cache.

Settings are huggingface_hub's: ``HF_HOME``, ``HF_TOKEN``, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``.
Large files are downloaded here, to where huggingface_hub looks for them, because its own download
discards an interrupted part and does not verify hashes. Over plain HTTP a part is a prefix of the
file: ``blobs/SHA256.incomplete``, renamed once the hash is right. A branch or tag is recorded last,
so that offline it leads to complete models only.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, ModelInfo, constants, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    WeakFileLock,
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
)

from converters.gguf.types import GGMLType
from converters.quantize.encode import expected_layout
from converters.quantize.policy import Policy, source_bits
from mlxrun.errors import HubError, MlxrunError, OutOfSpaceError
from mlxrun.hub.names import Choice, HubFile, HubName, is_safe, size_text
from mlxrun.kernels.device import device
from mlxrun.memory.device import machine_memory

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


T = TypeVar("T")

_BARS = "huggingface_hub"
_NO_TELEMETRY = constants.HF_HUB_DISABLE_TELEMETRY  # as the user has it
_BUSY = (429, 502, 503, 504)
_PAUSES = (1.0, 2.0, 4.0)  # seconds before a retry without Retry-After
_LONGEST_PAUSE = 30.0


@contextmanager
def unobtrusive() -> Iterator[None]:
    """Disable huggingface_hub's progress bars and telemetry.

    For the user agent of its telemetry huggingface_hub fetches a list of known callers from the
    endpoint and keeps whatever JSON comes: a mirror or portal that answers ``[]`` breaks every
    later request of the process.
    """
    allowed = constants.HF_HUB_DISABLE_PROGRESS_BARS is None
    visible = allowed and not are_progress_bars_disabled(_BARS)
    if visible:
        disable_progress_bars(_BARS)
    constants.HF_HUB_DISABLE_TELEMETRY = True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_TELEMETRY = _NO_TELEMETRY
        if visible:
            enable_progress_bars(_BARS)


def patiently(ask: Callable[[], T]) -> T:
    """The answer to a request, with retries while the hub is busy."""
    for pause in _PAUSES:
        try:
            return ask()
        except HfHubHTTPError as error:
            wait = _asked_pause(error) or pause
            if error.response.status_code not in _BUSY or wait > _LONGEST_PAUSE:
                raise
        time.sleep(wait)
    return ask()


def _asked_pause(error: HfHubHTTPError) -> float:
    """Seconds of ``Retry-After``; 0 if there is none or it is a date."""
    text = str(error.response.headers.get("Retry-After", ""))
    return float(text) if text.isascii() and text.isdigit() else 0.0


# HfHubHTTPError derives from the HTTP client's own root (requests, httpx or httpx2, by version), so
# its bases catch every failure of a connection without naming the client.
TRANSPORT: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)

# Raised by an answer that is not the hub's JSON, such as a captive portal's page.
GARBLED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
FAILURES: tuple[type[Exception], ...] = (*TRANSPORT, *GARBLED)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_LOGIN = "log in with 'hf auth login' or set HF_TOKEN"


def is_transient(error: BaseException) -> bool:
    """Whether the hub is unreachable or overloaded, rather than refusing or the disk failing."""
    if isinstance(error, HfHubHTTPError):
        return _status(error) >= 500 or _status(error) in (408, 429)
    return not is_local(error)


def is_local(error: BaseException) -> bool:
    """Whether the disk failed, not the network."""
    local = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOTDIR, errno.EISDIR)
    return isinstance(error, OSError) and error.errno in (*local, *_NO_ROOM, errno.ENAMETOOLONG)


def translate(error: BaseException, name: HubName, file: str = "") -> MlxrunError:
    """The error to report for a failed download of a name or one of its files."""
    page = f"{constants.ENDPOINT}/{name.repo}"
    if isinstance(error, GatedRepoError):
        return HubError(
            f"{name.repo} is gated", hint=f"Accept its licence at {page}, then {_LOGIN}"
        )
    if isinstance(error, RevisionNotFoundError):
        return HubError(
            f"{name.repo} has no revision {name.revision}", hint=f"See {page}/tree/main for others"
        )
    if isinstance(error, RepositoryNotFoundError):
        return HubError(
            f"the hub has no model {name.repo}, or it is private",
            hint=f"Check the name; for a private model {_LOGIN}",
        )
    if isinstance(error, LocalEntryNotFoundError):  # the hub could not say what the file is
        return translate(error.__cause__, name, file) if error.__cause__ else _broken(error, name)
    if isinstance(error, EntryNotFoundError):
        return HubError(f"{name.repo} has no file {file or name.file}", hint=f"See {page}")
    if isinstance(error, HfHubHTTPError):
        return _refusal(error, name, page)
    if isinstance(error, OfflineModeIsEnabled):
        return HubError(
            f"{name} is not in the cache and offline mode is on",
            hint="Unset HF_HUB_OFFLINE to download it",
        )
    if isinstance(error, GARBLED):
        return HubError(
            f"{constants.ENDPOINT} does not answer as a hub: {type(error).__name__}: {error}",
            hint="Check HF_ENDPOINT, the proxy and whether the network asks for a login",
        )
    return _broken(error, name)


def _refusal(error: HfHubHTTPError, name: HubName, page: str) -> HubError:
    status = _status(error)
    if status in (401, 403):
        return HubError(
            f"the hub refuses access to {name.repo} (status {status})",
            hint=f"Check HF_TOKEN or {_LOGIN}; see {page}",
        )
    if status == 404:
        return HubError(f"the hub has no {name}", hint=f"See {page}")
    if status == 429:
        return HubError("the hub limits the rate of requests", hint=f"Wait a little, or {_LOGIN}")
    return HubError(
        f"the hub failed with status {status} for {name.repo}", hint="Try again in a minute"
    )


def _broken(error: BaseException, name: HubName) -> MlxrunError:
    """The disk or the connection failed."""
    cache = constants.HF_HUB_CACHE
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return OutOfSpaceError(
            f"the disk of the hub's cache {cache} is full", hint="Free some space or set HF_HOME"
        )
    if isinstance(error, OSError) and is_local(error):
        return HubError(
            f"the hub's cache {cache} cannot be written: {os.strerror(error.errno or 0)}",
            hint="Set HF_HOME to a directory of yours",
        )
    why = f"{error}".partition("\n")[0].rstrip(".") or type(error).__name__
    return HubError(
        f"{name.repo} could not be fetched from {constants.ENDPOINT}: {why}",
        hint="Check the connection and run it again: what is already here is kept",
    )


def _status(error: HfHubHTTPError) -> int:
    return error.response.status_code if error.response is not None else 0


_TIMEOUT = 15.0  # seconds for the list of files
_SIZE_LIMIT = 1 << 63
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one commit.

    Attributes:
        commit: 40 hexadecimal digits.
        files: as the hub lists them, or those in the cache if it is unreachable.
        problem: why the hub was unreachable, or None.
    """

    commit: str
    files: tuple[HubFile, ...]
    problem: HubError | None = None


def list_files(name: HubName) -> Listing:
    """The files of a repository, from the hub or, if it is unreachable, from the cache.

    Raises:
        HubError: no such repository or revision, no access, or unreachable and not cached.
    """
    try:
        with unobtrusive():
            info = patiently(lambda: _model_info(name))
        files = tuple(_file(file) for file in info.siblings or () if is_safe(file.rfilename))
        if not _COMMIT.fullmatch(info.sha or ""):
            raise ValueError(f"{info.sha!r} is no commit")
        return Listing(str(info.sha), files)
    except FAILURES as error:
        problem = translate(error, name)
        cached = _list_cached(name)
        if cached is None or not is_transient(error) or not isinstance(problem, HubError):
            raise problem from error
        return Listing(*cached, problem)


def folder(repo: str) -> Path:
    """Where huggingface_hub keeps a repository."""
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


def _model_info(name: HubName) -> ModelInfo:
    return HfApi(endpoint=constants.ENDPOINT).model_info(
        name.repo, revision=name.revision, files_metadata=True, timeout=_TIMEOUT
    )


def _list_cached(name: HubName) -> tuple[str, tuple[HubFile, ...]] | None:
    """The last known commit of a revision, and its files on disk."""
    kept = folder(name.repo)
    commit = name.revision
    with suppress(OSError, UnicodeDecodeError):
        commit = (kept / "refs" / name.revision).read_text().strip()
    snapshot = kept / "snapshots" / commit
    if not _COMMIT.fullmatch(commit) or not snapshot.is_dir():
        return None
    files = (path for path in sorted(snapshot.rglob("*")) if path.is_file())
    return commit, tuple(
        HubFile(path.relative_to(snapshot).as_posix(), path.stat().st_size) for path in files
    )


def _file(stated: RepoSibling) -> HubFile:
    """A file of the hub's answer; raises ValueError for an impossible size."""
    size, sha256 = stated.size or 0, stated.lfs.sha256 if stated.lfs else ""
    if type(size) is not int or not 0 <= size < _SIZE_LIMIT:
        raise ValueError(f"{str(size)[:40]} is no size of a file")
    return HubFile(stated.rfilename, size, sha256 if _SHA256.fullmatch(sha256 or "") else None)


# KV cache of a few thousand tokens and scratch: a tenth of the weights.
_RUNNING = 1.1
# llama-quantize gives about this part of a file with K-quants or I-quants to the more sensitive
# tensors, at 6 bits: a Q4_K_M file of 4.85 bits a weight is a mixture of 4.5 and 6.56.
_FINER_SHARE, _FINER = 1 / 6, GGMLType.Q6_K
_TYPES = {
    "IQ2_M": GGMLType.IQ2_S,
    "IQ3_XS": GGMLType.IQ3_S,
    "IQ3_M": GGMLType.IQ3_S,
    "FP16": GGMLType.F16,
    "FP32": GGMLType.F32,
} | {kind.name: kind for kind in sorted(GGMLType, key=lambda kind: len(kind.name))}


def needed(choice: Choice) -> int:
    """About how many bytes a model takes while it runs on this machine; on a CPU, the file's."""
    before, after = (1.0, 1.0)
    if not device().keeps_blocks:
        before, after = _bits(choice.label.upper().removeprefix("UD-"))
    return int(choice.size * after / before * _RUNNING)


def fits(choice: Choice) -> bool:
    """Whether this machine has the memory to run a model; True if the memory is unknown."""
    room = machine_memory()
    return not room or needed(choice) <= room


def announcement(name: HubName, choice: Choice, missing: int) -> str:
    """Line to print before a download: its size, and the memory the model will take."""
    here = choice.size - missing
    kept = f", {size_text(here)} of it here already" if here else ""
    room = machine_memory()
    of = f" of the {size_text(room)} that this machine has for models" if room else ""
    what = f"{choice.label} of {name.repo}" if choice.first else name.repo
    return (
        f"downloading {what}, {size_text(choice.size)}{kept}; "
        f"it runs in about {size_text(needed(choice))}{of}"
    )


def warning(choice: Choice, others: Sequence[Choice]) -> str | None:
    """Warning for a model that is too large, with the largest of ``others`` that fits; or None."""
    if fits(choice):
        return None
    smaller = max(filter(fits, others), key=lambda other: other.size, default=None)
    advice = (
        f"the largest of this repository that does is {smaller.label} ({size_text(smaller.size)})"
        if smaller
        else "look for a smaller quantization or model"
    )
    return f"warning: {choice.label or 'it'} does not fit this machine's memory; {advice}"


@cache
def _bits(label: str) -> tuple[float, float]:
    """Bits per weight in the file and on a GPU; equal for an unknown type."""
    names = [name for name in _TYPES if label.startswith(name)]
    if not names:
        return 16.0, 16.0
    kind = _TYPES[max(names, key=len)]
    mixed = kind.name.startswith("IQ") or "_K" in kind.name
    shares = {kind: 1 - _FINER_SHARE, _FINER: _FINER_SHARE} if mixed else {kind: 1.0}
    if kind is _FINER:
        shares = {kind: 1.0}
    policy = Policy("near", "float16")
    before = sum(share * source_bits(each) for each, share in shares.items())
    after = sum(share * _held(each, policy) for each, share in shares.items())
    return before, after


def _held(kind: GGMLType, policy: Policy) -> float:
    expected = expected_layout(kind, policy, module=True)
    return expected.layout.bits_per_weight if expected else source_bits(kind)
