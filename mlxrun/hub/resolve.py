"""Resolve a model's name to a local file or directory, downloading it if need be."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from converters.staging import set_aside
from mlxrun.errors import HubError, SourceError
from mlxrun.hub.names import FORMS, HubName, Progress, choose, gguf_models, has_address

Notify = Callable[[str], None]


def resolve(
    source: str | Path, *, progress: Progress | None = None, notify: Notify | None = None
) -> Path:
    """The local file or directory of a source, downloaded if need be.

    An existing path wins. What looks like a path (a ``Path`` object, a leading ``./`` ``../`` ``/``
    ``~``, no or many slashes, a ``.gguf`` next to existing files) is never looked up on the hub.

    Args:
        source: a path, or a name as :class:`HubName` parses it.
        progress: called with (bytes present, total bytes) during a download.
        notify: called with lines of text before a download; see :func:`pull`.

    Raises:
        SourceError: nothing there; suggests the nearest name.
        HubError: no such model on the hub, no access, or unreachable and not cached.
        OutOfSpaceError: not enough disk space.
    """
    if not isinstance(source, str | os.PathLike):
        raise SourceError(f"{source!r} is not a model", hint=f"Give a path; {FORMS}")
    text = os.fspath(source)
    if isinstance(source, str) and has_address(text):
        return pull(text, progress=progress, notify=notify)
    path = _expand(text)
    if _exists(path):
        return path
    if _exists(old := set_aside(path)):
        raise SourceError(
            f"there is no model at {text}: a conversion that was replacing it has been killed",
            hint=f"Bring the old model back: {shlex.join(['mv', str(old), str(path)])}",
        )
    if isinstance(source, Path) or _looks_local(text):
        raise _missing(text, path)
    try:
        return pull(text, progress=progress, notify=notify)
    except HubError as error:  # "models/tinylama" could be either
        if nearest := _nearest(path):
            hint = f"{error.hint or 'Check the name'}. Or did you mean the local {nearest}?"
            raise HubError(error.message, hint=hint) from error
        raise


def pull(source: str, *, progress: Progress | None = None, notify: Notify | None = None) -> Path:
    """Download a model of the hub into the local cache.

    Offline, or with ``HF_HUB_OFFLINE=1``, the cache is used.

    Args:
        source: a name on the hub.
        progress: called with (bytes present, total bytes) during a download.
        notify: called before a download with its size and the model's memory, and with a warning
            if that is too much.

    Returns:
        The GGUF file (first shard of a split one), or the directory of a model without GGUF.

    Raises:
        SourceError: not a name.
        HubError: no such model, no access, or unreachable and not cached; an ambiguous name; a
            damaged download.
        OutOfSpaceError: not enough disk space.
    """
    name = HubName.parse(source)
    from mlxrun.hub import download  # imports huggingface_hub: only for a name on the hub

    listing = download.list_files(name)
    try:
        choice = choose(name, listing.files, download.fits)
    except HubError as error:
        if listing.problem is None:
            raise
        problem = f"{listing.problem.message}; in the cache, {error.message}"
        raise HubError(problem, hint=listing.problem.hint) from error
    missing = listing.bytes_to_fetch(choice)
    if missing and notify:
        notify(download.announcement(name, choice, missing))
        if too_large := download.warning(choice, gguf_models(listing.files)):
            notify(too_large)
    return download.fetch(listing, choice, progress)


def _expand(text: str) -> Path:
    if not text or "\0" in text:
        raise SourceError(f"{text!r} is not a model", hint=f"Give a path; {FORMS}")
    try:
        # Path drops "./", after which a tilde is just a letter
        return Path(text).expanduser() if text.startswith("~") else Path(text)
    except RuntimeError as error:  # "~nobody"
        raise SourceError(
            f"there is no home directory for {text}", hint="Check the path"
        ) from error


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError as error:
        raise SourceError(f"{path} may not be read", hint="Check its permissions") from error
    except (OSError, ValueError):  # a name that no file system takes
        return False


def _looks_local(text: str) -> bool:
    """Whether a source that does not exist was meant as a path."""
    if text.startswith(("/", "./", "../", "~")) or text in (".", ".."):
        return True
    slashes = text.partition("@")[0].count("/")
    if text.lower().endswith(".gguf"):  # org/repo/file.gguf, unless there is such a directory
        return slashes < 2 or _exists(Path(text).parent)
    return slashes != 1 and ".gguf@" not in text.lower()


def _missing(text: str, path: Path) -> SourceError:
    nearest = _nearest(path)
    if nearest:
        hint = f"Did you mean {nearest}?"
    elif _exists(path.parent):
        folder = path.parent.resolve()
        hint = f"No name in the directory {folder} is similar; {FORMS}"
    else:
        hint = f"Even the directory {path.parent} does not exist; {FORMS}"
    return SourceError(f"there is no model at {text}", hint=hint)


def _nearest(path: Path) -> Path | None:
    """The model in the same directory whose name is most like the missing one's."""
    try:
        names = {
            each.name.lower(): each.name
            for each in path.parent.iterdir()
            if (each.suffix.lower() == ".gguf" or each.is_dir()) and each.name != path.name
        }
    except (OSError, ValueError):
        return None
    found = get_close_matches(path.name.lower(), names, n=1)
    return path.with_name(names[found[0]]) if found else None
