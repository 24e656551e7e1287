"""Names of models on the hub.

::

    org/repo                        org/repo:Q4_K_M
    org/repo/file.gguf              org/repo/folder/file.gguf
    any of these followed by @revision (a branch, a tag or a commit)
    hf.co/... and https://huggingface.co/... before any of these, browser addresses included
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote

from mlxrun.errors import SourceError

GRAMMAR = "A model on the hub is org/repo, org/repo:QUANT or org/repo/file.gguf"
MAIN = "main"

_PREFIX = re.compile(r"hf://|(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/", re.IGNORECASE)
_PAGE = re.compile(r"([^/]+/[^/]+)/(?:blob|resolve|tree)/([^/]+)(/.+)?")
_NAME = re.compile(r"(?P<repo>[^/:@]*/[^/:@]*)(?P<file>/[^:@]*)?(?P<marks>(?:[:@][^:@]*)*)")
_OWNER = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?")
_QUANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*(?:/[A-Za-z0-9_][A-Za-z0-9_.+-]*)*")
_LONGEST = 96  # characters of a repository's name: the hub's own limit


@dataclass(frozen=True)
class HubName:
    """One model on the hub.

    Attributes:
        repo: ``org/name``.
        quant: a word of the file's name, e.g. ``Q4_K_M``.
        file: path within the repository; never together with ``quant``.
        revision: branch, tag or commit.
    """

    repo: str
    quant: str | None = None
    file: str | None = None
    revision: str = MAIN

    @classmethod
    def parse(cls, text: str) -> HubName:
        """Parse a name; raises SourceError with the grammar."""
        found = _NAME.fullmatch(_without_address(text))
        if not found:
            raise _malformed(text, "it has no org/repo")
        repo, file = found["repo"], found["file"]
        marks = re.findall(r"([:@])([^:@]*)", found["marks"])
        if len({mark for mark, _ in marks}) < len(marks):
            raise _malformed(text, "it gives a quantisation or a revision twice")
        values = dict(marks)
        quant, revision = values.get(":"), values.get("@", MAIN)
        if not _is_repo(repo):
            raise _malformed(text, f"{repo!r} cannot be a repository")
        if file is not None and not (is_safe(file[1:]) and file.lower().endswith(".gguf")):
            raise _malformed(text, f"{file[1:]!r} cannot be a .gguf file in a repository")
        if quant is not None and (file is not None or not _QUANT.fullmatch(quant)):
            why = "cannot be a quantisation" if file is None else "says again which file"
            raise _malformed(text, f"{quant!r} {why}")
        if not _REVISION.fullmatch(revision) or ".." in revision:
            raise _malformed(text, f"{revision!r} cannot be a revision")
        return cls(repo, quant, file[1:] if file else None, revision)

    def __str__(self) -> str:
        quant = f":{self.quant}" if self.quant else ""
        file = f"/{self.file}" if self.file else ""
        return f"{self.repo}{file}{quant}" + (f"@{self.revision}" if self.revision != MAIN else "")


def has_address(text: str) -> bool:
    """Whether a source has a hub address, so that it cannot be a local path."""
    return _PREFIX.match(text) is not None


def is_safe(path: str) -> bool:
    """Whether a repository path stays inside the directory as a local path."""
    parts = path.split("/")
    return path.isprintable() and "\\" not in path and not {"", ".", ".."}.intersection(parts)


def _without_address(text: str) -> str:
    """``https://hf.co/org/repo/blob/main/x.gguf?download=true`` -> ``org/repo/x.gguf@main``."""
    prefix = _PREFIX.match(text)
    if not prefix:
        return text
    rest = re.split(r"[?#]", text[prefix.end() :])[0].rstrip("/")
    page = _PAGE.fullmatch(rest)
    if not page:
        return rest
    repo, revision, file = page.groups(default="")
    return f"{repo}{unquote(file)}@{unquote(revision)}"


def _is_repo(repo: str) -> bool:
    """The hub's rules: letters, digits, dots and dashes, the latter not doubled or at the ends."""
    owner, name = repo.split("/")
    good = _OWNER.fullmatch(owner) and _OWNER.fullmatch(name) and len(repo) <= _LONGEST
    return bool(good) and "--" not in repo and ".." not in repo and not repo.endswith(".git")


def _malformed(text: str, why: str) -> SourceError:
    return SourceError(f"{text!r} is not a model: {why}", hint=GRAMMAR)
