"""Names of models on the hub, and which files of a repository a name means.

::

    org/repo                        org/repo:Q4_K_M
    org/repo/file.gguf              org/repo/folder/file.gguf
    any of these followed by @revision (a branch, a tag or a commit)
    hf.co/... and https://huggingface.co/... before any of these, browser addresses included
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import unquote

from mlxrun.errors import HubError, SourceError

Progress = Callable[[int, int], None]
"""Called with (bytes present, total bytes)."""

FORMS = "a model on the hub is org/repo, org/repo:QUANT or org/repo/file.gguf"
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
            raise _malformed(text, "it gives a quantization or a revision twice")
        values = dict(marks)
        quant, revision = values.get(":"), values.get("@", MAIN)
        if not _is_repo(repo):
            raise _malformed(text, f"{repo!r} cannot be a repository")
        if file is not None and not (is_safe(file[1:]) and file.lower().endswith(".gguf")):
            raise _malformed(text, f"{file[1:]!r} cannot be a .gguf file in a repository")
        if quant is not None and (file is not None or not _QUANT.fullmatch(quant)):
            why = "cannot be a quantization" if file is None else "says again which file"
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
    return SourceError(f"{text!r} is not a model: {why}", hint=f"Check the name: {FORMS}")


# --- which files of a repository are the model ----------------------------------------------------

_DEFAULT_QUANT = "Q4_K_M"  # the default of llama.cpp and Ollama
_MOST_SHARDS = 1000  # keeps a hostile list from costing memory

_SHARD = re.compile(r"(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.(?:gguf|safetensors)")
_NOT_A_MODEL = re.compile(
    r"(?<![a-z0-9])(?:mmproj|imatrix|ggml-vocab|vocab-?only)(?![a-z0-9])", re.IGNORECASE
)
# Companions of a model, unless there is nothing else: then the word is part of its name.
_COMPANION = re.compile(r"(?<![a-z0-9])(?:lora|adapter|vocab)(?![a-z0-9])", re.IGNORECASE)
_WEIGHTS = re.compile(r"model(?:-\d{5}-of-\d{5})?\.safetensors")
_LABEL = re.compile(
    r"(?<![A-Z0-9])(?:UD-)?(?:I?Q[1-8]_\w+|TQ[12]_0|(?:MX|NV)FP4\w*|B?F16|F32|FP16|FP32|Q[1-8])"
    r"(?![A-Z0-9])",
    re.IGNORECASE,
)
_TEXT_FILES = re.compile(
    r"config\.json|generation_config\.json|tokenizer[\w.-]*|special_tokens_map\.json"
    r"|added_tokens\.json|vocab\.(?:json|txt)|merges\.txt|chat_template\.\w+"
    r"|[\w.-]+\.tiktoken|tekken\.json|model[\w.-]*\.safetensors\.index\.json"
)


@dataclass(frozen=True)
class HubFile:
    """A file of a repository: path, bytes, and hash if the hub has one."""

    path: str
    size: int
    sha256: str | None = None


@dataclass(frozen=True)
class Choice:
    """The files of one model, in download order.

    Attributes:
        first: the path to open: a GGUF, the first of its shards, or ``""`` for the directory.
    """

    files: tuple[HubFile, ...]
    first: str

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def label(self) -> str:
        """The quantization's name, or the whole path if it has none."""
        labels = _LABEL.findall(PurePosixPath(self.first).name) or _LABEL.findall(self.first)
        return labels[-1] if labels else self.first


Fits = Callable[[Choice], bool]


def choose(name: HubName, files: Sequence[HubFile], fits: Fits | None = None) -> Choice:
    """The files of the requested model among those of its repository.

    Args:
        fits: whether this machine can run a model, to mark the choices in error messages.
    """
    choice = _choose(name, files, fits)
    paths = {file.path for file in choice.files}
    shards = {path for each in paths for path in _shards(each)}
    if missing := sorted(shards - paths):
        total = len(missing) + sum(bool(_SHARD.fullmatch(path)) for path in paths)
        raise HubError(
            f"{name.repo} lacks {len(missing)} of {total} shards of "
            f"{choice.first or 'its weights'}, {missing[0]} among them"
        )
    return choice


def gguf_models(files: Iterable[HubFile]) -> list[Choice]:
    """The GGUF models of a repository, smallest first; shards count as one."""
    models = [file for file in files if not _NOT_A_MODEL.search(file.path)]
    plain = [file for file in models if not _COMPANION.search(PurePosixPath(file.path).name)]
    return _grouped(plain) or _grouped(models)


def size_text(size: int) -> str:
    """``4.7 GB``: decimal units, as the hub's."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _choose(name: HubName, files: Sequence[HubFile], fits: Fits | None) -> Choice:
    if name.file:
        return _file(name, name.file, files, fits)
    choices = gguf_models(files)
    if not choices and not name.quant:
        return _directory(name, files)
    if not choices:
        raise HubError(
            f"{name.repo} has no GGUF files, so no {name.quant}", hint=f"Ask for {name.repo} alone"
        )
    if not name.quant and len(choices) == 1:
        return choices[0]
    matching = _matching(name.quant or _DEFAULT_QUANT, choices)
    if len(matching) == 1:
        return matching[0]
    if name.quant:
        models = "models" if len(matching) > 1 else "model"
        problem = f"{name.repo} has {len(matching) or 'no'} {name.quant} {models}"
    else:
        problem = f"{name.repo} has {len(choices)} models"
    shown = matching or choices
    first = _short_names(shown)[0]
    raise HubError(
        f"{problem}: {_listed(shown, _short_names(shown), fits)}",
        hint=f"Name one, as in {name.repo}{'/' if first == shown[0].first else ':'}{first}",
    )


def _file(name: HubName, path: str, files: Sequence[HubFile], fits: Fits | None) -> Choice:
    """A named file, with the other shards if it is one."""
    shards = set(_shards(path))
    found = sorted((file for file in files if file.path in shards), key=lambda file: file.path)
    if path not in {file.path for file in found}:
        models = _grouped(files)
        listed = _listed(models, [model.first for model in models], fits) or "no GGUF files"
        raise HubError(f"{name.repo} has no file {path}", hint=f"It has {listed}")
    return Choice(tuple(found), found[0].path)


def _directory(name: HubName, files: Sequence[HubFile]) -> Choice:
    """Config, tokenizer and safetensors of a repository without GGUF, small files first."""
    top = sorted((file for file in files if "/" not in file.path), key=lambda file: file.path)
    safetensors = [file for file in top if file.path.endswith(".safetensors")]
    weights = [file for file in safetensors if _WEIGHTS.fullmatch(file.path)] or safetensors
    texts = [file for file in top if _TEXT_FILES.fullmatch(file.path)]
    if not weights or "config.json" not in {file.path for file in texts}:
        kinds = sorted({PurePosixPath(file.path).suffix or file.path for file in files})
        raise HubError(
            f"{name.repo} has neither GGUF files nor config.json with safetensors, "
            f"only {', '.join(kinds[:12]) or 'nothing'}",
            hint="Look for a GGUF or MLX version of the model",
        )
    return Choice((*texts, *weights), "")


def _grouped(files: Iterable[HubFile]) -> list[Choice]:
    groups: dict[str, list[HubFile]] = {}
    for file in sorted(files, key=lambda file: file.path):
        if file.path.lower().endswith(".gguf"):
            groups.setdefault(_shards(file.path)[0], []).append(file)
    choices = [Choice(tuple(group), first) for first, group in groups.items()]
    return sorted(choices, key=lambda choice: (choice.size, choice.first))


def _matching(quant: str, choices: Sequence[Choice]) -> list[Choice]:
    """Choices whose path has the quantization as a word, or the one whose label equals it."""
    word = re.compile(rf"(?<![a-z0-9]){re.escape(quant)}(?![a-z0-9_])", re.IGNORECASE)
    found = [choice for choice in choices if word.search(choice.first)]
    exact = [choice for choice in found if choice.label.lower() == quant.lower()]
    return exact if len(exact) == 1 else found


def _shards(path: str) -> list[str]:
    """All shards of a path's split file, or the path alone."""
    found = _SHARD.fullmatch(path)
    if not found or not 0 < int(found["index"]) <= int(found["count"]) <= _MOST_SHARDS:
        return [path]
    stem, count, suffix = found["stem"], int(found["count"]), PurePosixPath(path).suffix
    return [f"{stem}-{index:05}-of-{count:05}{suffix}" for index in range(1, count + 1)]


def _short_names(choices: Sequence[Choice]) -> list[str]:
    """Labels; the path where labels repeat."""
    labels = [choice.label for choice in choices]
    return [choice.label if labels.count(choice.label) == 1 else choice.first for choice in choices]


def _listed(choices: Sequence[Choice], names: Sequence[str], fits: Fits | None) -> str:
    """Names and sizes."""
    return "; ".join(
        f"{name} ({size_text(choice.size)}"
        f"{'' if fits is None or fits(choice) else ', too large for this machine'})"
        for choice, name in zip(choices, names, strict=True)
    )
