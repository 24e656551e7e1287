"""Files of repositories on the hub: list, estimate, download and verify them.

The settings are huggingface_hub's: ``HF_HOME``, ``HF_TOKEN``, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``.
Large files are downloaded here, into its own cache, because its download (2.4) discards an
interrupted part and does not verify hashes. Over plain HTTP a part is a prefix of the file:
``blobs/SHA256.incomplete``, renamed once the hash is right. A branch or tag is recorded last, so
that offline it leads to complete models only.
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
from typing import Final, TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url
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
from mlxrun.hub.names import Choice, HubFile, HubName, Progress, is_safe, size_text
from mlxrun.kernels.device import device
from mlxrun.memory.device import machine_memory

T = TypeVar("T")

_LARGEST = 50_000_000_000  # bytes that the hub serves over plain HTTP
_SIZE_LIMIT = 1 << 63  # bytes of any file
_TIMEOUT = 15.0  # seconds for the list of files
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


# --- files of a repository ------------------------------------------------------------------------


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one commit.

    Attributes:
        commit: 40 hexadecimal digits.
        files: as the hub lists them, or those in the cache if it is unreachable.
        problem: why the hub was unreachable, or None.
    """

    name: HubName
    commit: str
    files: tuple[HubFile, ...]
    problem: HubError | None = None

    @property
    def snapshot(self) -> Path:
        return _folder(self.name) / "snapshots" / self.commit

    def missing(self, choice: Choice) -> list[HubFile]:
        """The chosen files that are not in the cache, or cut short there."""
        return [file for file in choice.files if not _is_complete(self.snapshot / file.path, file)]

    def bytes_to_fetch(self, choice: Choice) -> int:
        """Bytes that :func:`fetch` would download; partial files count as present."""
        return sum(file.size - _present(self.name, file) for file in self.missing(choice))


def list_files(name: HubName) -> Listing:
    """The files of a repository, from the hub or, if it is unreachable, from the cache."""
    api = HfApi(endpoint=constants.ENDPOINT)
    try:
        with _unobtrusive():
            info = _with_retries(
                lambda: api.model_info(
                    name.repo, revision=name.revision, files_metadata=True, timeout=_TIMEOUT
                )
            )
        files = tuple(_file(entry) for entry in info.siblings or () if is_safe(entry.rfilename))
        if not _COMMIT.fullmatch(info.sha or ""):
            raise ValueError(f"{info.sha!r} is no commit")
        return Listing(name, str(info.sha), files)
    except FAILURES as error:
        problem = _translate(error, name)
        cached = _list_cached(name, problem) if isinstance(problem, HubError) else None
        if cached is None or not _is_transient(error):
            raise problem from error
        return cached


def _list_cached(name: HubName, problem: HubError) -> Listing | None:
    """The last known commit of a revision, and its files on disk."""
    commit = name.revision
    with suppress(OSError, UnicodeDecodeError):
        commit = (_folder(name) / "refs" / name.revision).read_text().strip()
    snapshot = _folder(name) / "snapshots" / commit
    if not _COMMIT.fullmatch(commit) or not snapshot.is_dir():
        return None
    files = (path for path in sorted(snapshot.rglob("*")) if path.is_file())
    found = [HubFile(path.relative_to(snapshot).as_posix(), path.stat().st_size) for path in files]
    return Listing(name, commit, tuple(found), problem)


def _file(entry: RepoSibling) -> HubFile:
    """A file of the hub's answer; raises ValueError for an impossible size."""
    size, sha256 = entry.size or 0, entry.lfs.sha256 if entry.lfs else ""
    if type(size) is not int or not 0 <= size < _SIZE_LIMIT:
        raise ValueError(f"{str(size)[:40]} is no size of a file")
    return HubFile(entry.rfilename, size, sha256 if _SHA256.fullmatch(sha256 or "") else None)


def _folder(name: HubName) -> Path:
    """Where huggingface_hub keeps a repository."""
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name.repo, repo_type="model")


def _is_complete(path: Path, file: HubFile) -> bool:
    return path.exists() and (not file.sha256 or path.stat().st_size == file.size)


def _present(name: HubName, file: HubFile) -> int:
    """Bytes of a missing file that are in the cache under its hash or as a part."""
    if not file.sha256:
        return 0
    blob = _folder(name) / "blobs" / file.sha256
    return min(file.size, max(_size(blob), _size(blob.with_name(f"{blob.name}.incomplete"))))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


# --- memory, estimated before a download ----------------------------------------------------------
#
# The quantization's name gives the type of most tensors, and the converter the layout of that type.
# K/V and scratch follow from the header, which is not downloaded yet, so they are taken as a share
# of the weights; the memory plan checks again at loading.

# KV cache of a few thousand tokens and scratch: a tenth of the weights.
_RUNNING: Final = 1.1
# llama-quantize gives about this part of a file with K-quants or I-quants to the more sensitive
# tensors, at 6 bits: a Q4_K_M file of 4.85 bits a weight is a mixture of 4.5 and 6.56.
_FINER_SHARE: Final = 1 / 6
_TYPES: Final = {
    "IQ2_M": GGMLType.IQ2_S,
    "IQ3_XS": GGMLType.IQ3_S,
    "IQ3_M": GGMLType.IQ3_S,
    "FP16": GGMLType.F16,
    "FP32": GGMLType.F32,
    **{type_.name: type_ for type_ in GGMLType},
}


def needed(choice: Choice) -> int:
    """About how many bytes a model takes while it runs on this machine; on a CPU, the file's."""
    ratio = 1.0 if device().keeps_blocks else _growth(choice.label.upper().removeprefix("UD-"))
    return int(choice.size * ratio * _RUNNING)


def fits(choice: Choice) -> bool:
    """Whether this machine has the memory to run a model; True if the memory is unknown."""
    available = machine_memory()
    return not available or needed(choice) <= available


def announcement(name: HubName, choice: Choice, missing: int) -> str:
    """Line to print before a download: its size, and the memory the model will take."""
    present, available = choice.size - missing, machine_memory()
    cached = f", {size_text(present)} of it here already" if present else ""
    of = f" of the {size_text(available)} that this machine has for models" if available else ""
    what = f"{choice.label} of {name.repo}" if choice.first else name.repo
    return (
        f"downloading {what}, {size_text(choice.size)}{cached}; "
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
def _growth(label: str) -> float:
    """Bits per weight on a GPU over those in the file; 1 for an unknown type."""
    names = [name for name in _TYPES if label.startswith(name)]
    if not names:
        return 1.0
    type_ = _TYPES[max(names, key=len)]
    shares = {type_: 1.0}
    if type_.name.startswith("IQ") or "_K" in type_.name:
        shares = {type_: 1 - _FINER_SHARE, GGMLType.Q6_K: _FINER_SHARE}
    if type_ is GGMLType.Q6_K:
        shares = {type_: 1.0}
    before = sum(share * source_bits(each) for each, share in shares.items())
    return sum(share * _bits_on_gpu(each) for each, share in shares.items()) / before


def _bits_on_gpu(type_: GGMLType) -> float:
    expected = expected_layout(type_, Policy("near", "float16"), module=True)
    return expected.layout.bits_per_weight if expected else source_bits(type_)


# --- download -------------------------------------------------------------------------------------


def fetch(listing: Listing, choice: Choice, progress: Progress | None) -> Path:
    """Download the chosen files that are not in the cache.

    Args:
        progress: called with (bytes present, total bytes) during a download.

    Returns:
        The file to open, or the directory.
    """
    name, missing = listing.name, listing.missing(choice)
    _check_space(name, listing.bytes_to_fetch(choice))
    done = choice.size - sum(file.size for file in missing)
    with _unobtrusive():
        for file in missing:

            def report(position: int, done: int = done) -> None:
                if progress:
                    progress(done + position, choice.size)

            try:
                _fetch_file(name, listing.commit, file, report)
            except FAILURES as error:
                raise _translate(error, name, file.path) from error
            done += file.size
    if listing.problem is None:
        with suppress(OSError):  # a read-only cache serves as well
            _record(name, listing.commit)
    return listing.snapshot / choice.first


def _fetch_file(name: HubName, commit: str, file: HubFile, report: Callable[[int], None]) -> None:
    """Download one file, verified if the hub knows its SHA-256."""
    report(0)
    verified = None
    if file.sha256 and file.size <= _LARGEST:
        verified = _fetch_blob(name, commit, file, file.sha256, report)
    # Finds the blob and links to it; downloads all other files.
    path = Path(hf_hub_download(name.repo, file.path, revision=commit, endpoint=constants.ENDPOINT))
    blob = path.resolve()
    if file.sha256 and blob != verified and _hash(blob) != file.sha256:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise _damaged(name, file)
    report(file.size)


def _fetch_blob(
    name: HubName, commit: str, file: HubFile, sha256: str, report: Callable[[int], None]
) -> Path:
    """Complete ``blobs/SHA256.incomplete``, check it, and rename it to ``blobs/SHA256``."""
    blob = _folder(name) / "blobs" / sha256
    partial = blob.with_name(f"{sha256}.incomplete")
    lock = Path(constants.HF_HUB_CACHE, ".locks", blob.parts[-3], f"{sha256}.lock")
    for directory in (blob.parent, lock.parent):
        directory.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if _is_complete(blob, file):
            return blob.resolve()
        if blob.exists():  # cut short by a crash
            blob.replace(partial)
        if _size(partial) > file.size:  # not a prefix of this file
            partial.unlink()
        resumed = _size(partial) > 0
        _stream(name, commit, file, partial, report)
        while _hash(partial) != sha256:
            partial.unlink()
            if not resumed:
                raise _damaged(name, file)
            resumed = False  # the earlier part may be damaged: once more, from the start
            _stream(name, commit, file, partial, report)
        return partial.rename(blob).resolve()


def _stream(
    name: HubName, commit: str, file: HubFile, partial: Path, report: Callable[[int], None]
) -> None:
    """Append the rest of a file, as long as every attempt brings some bytes."""
    url = hf_hub_url(name.repo, file.path, revision=commit, endpoint=constants.ENDPOINT)
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    partial.touch()
    while (before := _size(partial)) < file.size:
        try:
            with _PartialFile(partial, report) as sink:
                _with_retries(
                    lambda: http_get(
                        url, sink, resume_size=before, headers=headers, expected_size=file.size
                    )
                )
        except TRANSPORT as error:
            if not _is_transient(error) or _size(partial) <= before:
                raise


class _PartialFile(io.BufferedWriter):
    """A file that is appended to and reports its length."""

    def __init__(self, path: Path, report: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self._report = report

    def write(self, data: bytes | bytearray | memoryview, /) -> int:  # type: ignore[override]
        written = super().write(data)
        self._report(self.tell())
        return written


def _check_space(name: HubName, needed: int) -> None:
    cache = Path(constants.HF_HUB_CACHE)
    try:
        existing = next(path for path in (cache, *cache.parents) if path.exists())
        free = shutil.disk_usage(existing).free
    except OSError as error:
        raise _translate(error, name) from error
    if needed > free:
        raise OutOfSpaceError(
            f"{name} needs {size_text(needed)} and {existing} has {size_text(free)} free",
            hint="Free some space or set HF_HOME to another disk",
        )


def _record(name: HubName, commit: str) -> None:
    """Record the commit of a branch or tag, as huggingface_hub does."""
    ref = _folder(name) / "refs" / name.revision
    if name.revision != commit and not (ref.is_file() and ref.read_text() == commit):
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(name: HubName, file: HubFile) -> HubError:
    return HubError(
        f"{file.path} of {name.repo} arrived damaged (not the hub's SHA-256) and was removed",
        hint="Run it again; if it fails again, the mirror or proxy alters files",
    )


# --- huggingface_hub: quiet, patient, and its failures --------------------------------------------

_BARS = "huggingface_hub"
_NO_TELEMETRY = constants.HF_HUB_DISABLE_TELEMETRY  # as the user has it
_BUSY = (429, 502, 503, 504)
_PAUSES = (1.0, 2.0, 4.0)  # seconds before a retry without Retry-After
_LONGEST_PAUSE = 30.0

# HfHubHTTPError derives from the HTTP client's own root (requests, httpx or httpx2, by version), so
# its bases catch every failure of a connection without naming the client.
TRANSPORT: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)
# Raised by an answer that is not the hub's JSON, such as a captive portal's page.
GARBLED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
FAILURES: tuple[type[Exception], ...] = (*TRANSPORT, *GARBLED)

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_DISK = (
    *_NO_SPACE,
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
)
_LOGIN = "log in with 'hf auth login' or set HF_TOKEN"
_NO_ACCESS = (
    "the hub refuses access to {repo} (status {status})",
    f"Check HF_TOKEN or {_LOGIN}; see {{page}}",
)
# Message and hint by class of exception, or by status of the hub's answer.
_REFUSALS: Final[tuple[tuple[type[Exception] | int, str, str], ...]] = (
    (GatedRepoError, "{repo} is gated", f"Accept its license at {{page}}, then {_LOGIN}"),
    (
        RevisionNotFoundError,
        "{repo} has no revision {name.revision}",
        "See {page}/tree/main for others",
    ),
    (
        RepositoryNotFoundError,
        "the hub has no model {repo}, or it is private",
        f"Check the name; for a private model {_LOGIN}",
    ),
    (EntryNotFoundError, "{repo} has no file {file}", "See {page}"),
    (
        OfflineModeIsEnabled,
        "{name} is not in the cache and offline mode is on",
        "Unset HF_HUB_OFFLINE to download it",
    ),
    (401, *_NO_ACCESS),
    (403, *_NO_ACCESS),
    (404, "the hub has no {name}", "See {page}"),
    (429, "the hub limits the rate of requests", f"Wait a little, or {_LOGIN}"),
    (HfHubHTTPError, "the hub failed with status {status} for {repo}", "Try again in a minute"),
)


@contextmanager
def _unobtrusive() -> Iterator[None]:
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


def _with_retries(request: Callable[[], T]) -> T:
    """The answer to a request, asked again while the hub is busy."""
    for pause in _PAUSES:
        try:
            return request()
        except HfHubHTTPError as error:
            after = str(error.response.headers.get("Retry-After", ""))  # seconds, or a date
            wait = float(after) if after.isascii() and after.isdigit() else 0.0
            wait = wait or pause
            if error.response.status_code not in _BUSY or wait > _LONGEST_PAUSE:
                raise
        time.sleep(wait)
    return request()


def _status(error: BaseException) -> int:
    response = error.response if isinstance(error, HfHubHTTPError) else None
    return response.status_code if response is not None else 0


def _is_transient(error: BaseException) -> bool:
    """Whether the hub is unreachable or overloaded, rather than refusing or the disk failing."""
    if isinstance(error, HfHubHTTPError):
        return _status(error) >= 500 or _status(error) in (408, 429)
    return not (isinstance(error, OSError) and error.errno in _DISK)


def _translate(error: BaseException, name: HubName, file: str = "") -> MlxrunError:
    """The error to report for a failed download of a name or one of its files."""
    if isinstance(error, LocalEntryNotFoundError):  # the hub has no metadata of the file
        return _translate(error.__cause__, name, file) if error.__cause__ else _broken(error, name)
    status = _status(error)
    for kind, message, hint in _REFUSALS:
        if kind == status if isinstance(kind, int) else isinstance(error, kind):
            facts = {
                "name": name,
                "repo": name.repo,
                "file": file or name.file,
                "page": f"{constants.ENDPOINT}/{name.repo}",
                "status": status,
            }
            return HubError(message.format(**facts), hint=hint.format(**facts))
    if isinstance(error, GARBLED):
        return HubError(
            f"{constants.ENDPOINT} does not answer as a hub: {type(error).__name__}: {error}",
            hint="Check HF_ENDPOINT, the proxy and whether the network asks for a login",
        )
    return _broken(error, name)


def _broken(error: BaseException, name: HubName) -> MlxrunError:
    """The disk or the connection failed."""
    cache = constants.HF_HUB_CACHE
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return OutOfSpaceError(
            f"the disk of the hub's cache {cache} is full", hint="Free some space or set HF_HOME"
        )
    if isinstance(error, OSError) and error.errno in _DISK:
        return HubError(
            f"the hub's cache {cache} cannot be written: {os.strerror(error.errno or 0)}",
            hint="Set HF_HOME to a directory of yours",
        )
    why = f"{error}".partition("\n")[0].rstrip(".") or type(error).__name__
    return HubError(
        f"{name.repo} could not be fetched from {constants.ENDPOINT}: {why}",
        hint="Check the connection and run it again: downloaded parts are kept",
    )
