"""What a shell completes for a MODEL: models in the hub's local cache, and those in folders here.

Looks at names only, reads nothing and asks no network: a shell calls it at every Tab.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

_PLAIN = re.compile(r"[\w.,:/@%+=~-]+")


class ModelName(click.ParamType[str]):
    """A model as users name it; anything passes."""

    name = "MODEL"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        # Shells put a name on the command line as it is: one with other characters would be several
        # words there, or a command.
        names = sorted(filter(_PLAIN.fullmatch, {*_local(incomplete), *_cached(incomplete)}))
        # Nothing found: what the shell itself finds, such as a folder to go on in.
        return [CompletionItem(name) for name in names] or [CompletionItem(incomplete, type="file")]


def _local(incomplete: str) -> Iterator[str]:
    """GGUF files and model directories in the folder of what is typed."""
    folder, start = os.path.split(incomplete)
    try:
        entries = list(Path(folder or ".").expanduser().iterdir())
        for entry in entries:
            if entry.name.startswith(start) and _is_model(entry):
                yield os.path.join(folder, entry.name)  # noqa: PTH118 - "./" and "~" stay
    except (OSError, ValueError, RuntimeError):
        return


def _is_model(path: Path) -> bool:
    return path.suffix.lower() == ".gguf" or (path / "config.json").is_file()


def _cached(incomplete: str) -> Iterator[str]:
    """Repositories in huggingface_hub's cache, where that would look for it."""
    home = os.environ.get("HF_HOME") or os.path.join(  # noqa: PTH118
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"
    )
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    try:
        for entry in Path(cache or os.path.join(home, "hub")).expanduser().iterdir():  # noqa: PTH118
            kind, _, repo = entry.name.partition("--")
            name = repo.replace("--", "/", 1)
            if kind == "models" and name.startswith(incomplete):
                yield name
    except (OSError, RuntimeError):
        return
