"""The page ``docs/models.md``: what runs, how near to llama.cpp, and what does not run.

``make docs`` writes it (``python -m tests.conformance.docs > docs/models.md``); a test keeps it up
to date. Figures are measured then and there, on every skeleton.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from textwrap import fill

from . import skeleton as skeletons
from .catalogue import CATALOGUE, REASONS, Known
from .features import Features, Words, features
from .measure import SAME, load, measure, on_cpu
from .skeleton import Skeleton

_PAGE = """\
# Models

<!-- Made by `make docs` from tests/conformance: edit the skeletons and `catalogue.py` there. -->

{count} of the {all} architectures that llama.cpp generates text with run: {native} on the one
transformer of this project, {other} on a class of MLX-LM. Each is checked against
llama.cpp with tiny random models, {models} in all, in `tests/conformance`: the same file, the
same tokens, float32 on a CPU.

* **NMSE** is `mean((a - b)^2) / mean(b^2)` over all logits, for the worst of an architecture's
  models, prefilled in one pass, in chunks and token by token. At most {same:.0e} is
  required. Figures above 2e-10 are of GELU, which llama.cpp looks up in a table of half-precision
  numbers.
* **runs** names the implementation of the layers: `native` is this project's, `mlx-lm` that
  package's.
* Attention, feed-forward and positions are those of the measured models.
* **vocabularies** are the kinds in files of the architecture.

{table}

## What does not run

{absent}
"""
_HEAD = (
    "architecture", "models", "runs", "NMSE",
    "attention", "feed-forward", "positions", "vocabularies",
)  # fmt: skip
UNMEASURED = "?"


def by_architecture() -> dict[str, list[Skeleton]]:
    """Every skeleton, under the name that GGUF files give its architecture."""
    found: dict[str, list[Skeleton]] = {}
    for name in skeletons.names():
        skeleton = skeletons.read(name)
        found.setdefault(skeleton.arch, []).append(skeleton)
    return dict(sorted(found.items()))


def worst(models: list[Skeleton]) -> float:
    """The largest NMSE of these models in any way of feeding them."""
    found = []
    with tempfile.TemporaryDirectory() as folder, on_cpu():
        for skeleton in models:
            loaded = load(skeleton.write(Path(folder) / f"{skeleton.name}.gguf"))
            found += measure(loaded, skeleton.token_ids(), skeletons.expected(skeleton)).values()
    return max(found)


def render(measured: Mapping[str, float]) -> str:
    """The whole page, Markdown; architectures without a figure are shown with a question mark."""
    models = by_architecture()
    described = {arch: [features(skeleton) for skeleton in models[arch]] for arch in models}
    native = sum(found[0].native for found in described.values())
    return _PAGE.format(
        count=len(models),
        all=len(CATALOGUE),
        native=native,
        other=len(models) - native,
        models=sum(map(len, models.values())),
        same=SAME,
        table="\n".join(_table(described, measured)),
        absent=_absent(set(models)),
    )


def _table(described: Mapping[str, list[Features]], measured: Mapping[str, float]) -> list[str]:
    rows = [_HEAD, ("---",) * len(_HEAD)]
    for arch, found in described.items():
        known = CATALOGUE.get(arch, Known("", ""))
        nmse = f"{measured[arch]:.0e}" if arch in measured else UNMEASURED
        words = (_union([getattr(f, part) for f in found]) for part in _PARTS)
        through = "native" if found[0].native else "mlx-lm"
        rows.append((f"`{arch}`", known.models, through, nmse, *words, known.tokenizers))
    return ["| " + " | ".join(row) + " |" for row in rows]


_PARTS = ("attention", "feed_forward", "positions")


def _union(found: list[Words]) -> str:
    return ", ".join(word for word in found[0] if any(words[word] for words in found)) or "none"


def _absent(present: set[str]) -> str:
    absent = {arch: known for arch, known in CATALOGUE.items() if arch not in present}
    reasons = [
        f"* `{arch}` ({known.models}): {REASONS[arch]}"
        for arch, known in absent.items()
        if arch in REASONS
    ]
    others = [f"`{arch}` ({known.models})" for arch, known in absent.items() if arch not in REASONS]
    rest = fill(f"* not yet added: {', '.join(others)}", 100, break_on_hyphens=False)
    return "\n".join([*reasons, rest])


def main() -> None:
    """Measure everything and print the page."""
    measured = {}
    for arch, models in by_architecture().items():
        measured[arch] = worst(models)
        print(f"{arch}: {measured[arch]:.1e}", file=sys.stderr)
    print(render(measured), end="")
    bad = [arch for arch, nmse in measured.items() if not nmse <= SAME]
    if bad:
        sys.exit(f"too far from llama.cpp: {', '.join(bad)}")


if __name__ == "__main__":
    main()
