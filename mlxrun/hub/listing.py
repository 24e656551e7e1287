"""The files of a repository, from the hub or, if it is unreachable, from the cache."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, ModelInfo, constants
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoSibling

from mlxrun.errors import HubError
from mlxrun.hub.choice import HubFile
from mlxrun.hub.client import patiently, unobtrusive
from mlxrun.hub.failures import FAILURES, is_transient, translate
from mlxrun.hub.names import HubName, is_safe

_TIMEOUT = 15.0  # seconds for the list of files
_LARGEST = 1 << 63  # bytes that no file has
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
    if type(size) is not int or not 0 <= size < _LARGEST:
        raise ValueError(f"{str(size)[:40]} is no size of a file")
    return HubFile(stated.rfilename, size, sha256 if _SHA256.fullmatch(sha256 or "") else None)
