"""A quantized cache gives the same logits however tokens are fed, in every kind of attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from cache_configs import caching
from conformance.measure import WAYS, load, logits
from oracle_models import expected, write_skeleton
from tiny_models import nmse

#: Most tokens agree so well. Not all: float noise between two ways may move a number to the next
#: code, which later tokens see, and an expert to another. A query that saw its own chunk unpacked
#: would be off by 1e-3 and more, at every token.
SAME = 1e-6
WINDOW: dict[str, Any] = {"window": 16, "keep": 3}
#: Plain, by channel, bounded and windowed, with sinks, latent.
CASES = [
    ("llama", {"keys": "q8", "values": "q4"}),
    ("llama", {"keys": "mxfp8", "values": "q2", **WINDOW}),
    ("llama", {"keys": "q3c/32", "values": "q5"}),
    ("gemma2", {"keys": "q5", "values": "q3"}),
    ("gpt-oss", {"keys": "q8", "values": "q8/32", **WINDOW}),
    ("deepseek2", {"keys": "q4c/32", "values": "q6"}),
    ("deepseek2", {"keys": "bf16", "values": "q4", **WINDOW}),
]


class Asked:
    """A model whose caches are always of some kind."""

    def __init__(self, model: Any, **wanted: Any) -> None:
        self.model, self.wanted = model, wanted

    def make_cache(self) -> list[Any]:
        cache: list[Any] = self.model.make_cache(caching(**self.wanted))
        return cache

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        logits: mx.array = self.model(tokens, cache)
        return logits


@pytest.fixture(scope="module")
def model(oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in made:
            path = tmp_path_factory.mktemp("skeleton") / f"{name}.gguf"
            made[name] = load(write_skeleton(oracle, name, path)).model
        return made[name]

    return get


def off(got: np.ndarray, wanted: np.ndarray) -> float:
    """The median over tokens (T, V) of the NMSE."""
    return float(np.median([nmse(a, b) for a, b in zip(got, wanted, strict=True)]))


@pytest.mark.parametrize(("name", "wanted"), CASES)
def test_the_same_however_fed(
    name: str, wanted: dict[str, Any], model: Callable[[str], Any], oracle: Path
) -> None:
    """Of most texts: an early code at a boundary, moved by rounding, moves all that follows."""
    tokens = expected(oracle, f"logits/{name}")[0]
    texts = [tokens[start : start + 40] for start in (0, 40, 80)]
    asked = Asked(model(name), **wanted)
    wholes = [logits(asked, text) for text in texts]
    for way in WAYS.values():
        fed = [logits(asked, text, way(len(text))) for text in texts]
        assert np.median([off(*each) for each in zip(fed, wholes, strict=True)]) <= SAME
    plain = {key: value for key, value in wanted.items() if key in WINDOW}
    unpacked = [logits(Asked(model(name), **plain), text) for text in texts]
    for each in zip(wholes, unpacked, strict=True):
        assert off(*each) > SAME  # it was quantized


@pytest.mark.parametrize(("name", "wanted"), CASES)
def test_rows_of_a_batch_are_as_alone(
    name: str, wanted: dict[str, Any], model: Callable[[str], Any], oracle: Path
) -> None:
    tokens = expected(oracle, f"logits/{name}")[0]
    asked = Asked(model(name), **wanted)
    prompts = [tokens[:3], tokens[5:45], tokens[20:110]]
    alone = [logits(asked, [*prompt, *tokens[110:114]], [len(prompt)])[-4:] for prompt in prompts]
    batch = asked.make_cache()
    for row, prompt in enumerate(prompts):
        cache = asked.make_cache()
        asked(mx.array([prompt]), cache)
        for joint, own in zip(batch, cache, strict=True):
            joint.place(row, own)
    together = [
        np.array(asked(mx.array([[token]] * len(prompts)), batch))[:, 0]
        for token in tokens[110:114]
    ]
    assert off(np.concatenate(together), np.concatenate(np.stack(alone, axis=1))) <= SAME
