"""Does mlxrun read every key of a skeleton as llama.cpp does, and do without it likewise?

usage: python -m tests.conformance.perturb NAME ...

Changes one key at a time, leaves it out, or adds what any file may have, and compares both again on
the changed file. A key that one of the two ignores shows as a large error; a file that mlxrun
refuses is reported, and is no error. Needs llama.cpp, as ``make`` does.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlxrun.errors import MlxrunError

from . import skeleton as skeletons
from .make import JudgeError, judge
from .measure import SAME, load, logits, nmse, on_cpu
from .skeleton import Skeleton, SkeletonError

#: Changes of these contradict the tensors.
_SHAPES = {
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "expert_feed_forward_length",
    "attention.key_length",
    "attention.value_length",
}


#: What a file of any architecture may say, each where the skeleton says nothing of it.
_ADDED: list[dict[str, Any]] = [
    {"attention.causal": False},
    {"rope.scaling.factor": 4.0},
    {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 16,
    },
    {"rope.scaling.attn_factor": 1.3},
]


def changes(keys: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every set of keys with one changed or left out, and what that is called."""
    for key, value in keys.items():
        rest = {name: kept for name, kept in keys.items() if name != key}
        if key != "block_count":
            yield f"without {key}", rest
        others = [] if key in _SHAPES else _others(value)
        if key == "expert_used_count":  # one weight, and those of all, may be special
            others = sorted({1, *others, keys["expert_count"]} - {value})
        for other in others:
            yield f"{key} = {other}", {**keys, key: other}
    for added in _ADDED:
        if not set(added) & set(keys):
            yield ", ".join(f"{key} = {value}" for key, value in added.items()), {**keys, **added}


def _others(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, float):
        return [2.5 * value]
    if isinstance(value, int):
        return [value + 1, value - 1] if value > 1 else [value + 1]
    return []


def compare(skeleton: Skeleton, folder: Path) -> str:
    """How mlxrun does on a file that llama.cpp may not even take; empty where it does well."""
    tokens = skeleton.token_ids()
    try:
        path = skeleton.write(folder / "changed.gguf")
        expected = judge(path, tokens)
    except (JudgeError, SkeletonError):
        return ""  # not a model
    try:
        with on_cpu():
            error = nmse(logits(load(path).model, tokens), expected.astype(float))
    except MlxrunError as refused:
        return f"refused: {refused}"
    return "" if error <= SAME else f"NMSE {error:.1e}"


def main() -> int:
    """The command; returns how many changes make a difference."""
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[1:] or skeletons.names():
            skeleton = skeletons.read(name)
            print(f"{name}:", flush=True)
            for what, keys in changes(skeleton.keys):
                found = compare(replace(skeleton, keys=keys), Path(folder))
                wrong += found.startswith("NMSE")
                if found:
                    print(f"  {what}: {found}", flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
