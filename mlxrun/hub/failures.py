"""Exceptions of ``huggingface_hub`` and its HTTP client as mlxrun's errors."""

from __future__ import annotations

import errno
import os

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mlxrun.errors import HubError, MlxrunError, OutOfSpaceError
from mlxrun.hub.names import HubName

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
