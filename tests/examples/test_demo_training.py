"""The training code of the demo model: its arithmetic, its batches, and the file it exports."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import mlxrun
from examples.train_demo import model as demo
from examples.train_demo.corpus import documents
from examples.train_demo.export import export
from examples.train_demo.tokenizer import train_tokenizer
from examples.train_demo.train import Run, batches, encode, loss, make_optimizer, train

CONFIG = demo.Config(
    layers=2, hidden=64, heads=4, kv_heads=2, feed_forward=96, vocabulary=320, context=128
)


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    return train_tokenizer(CONFIG.vocabulary, seed=1, count=100)


def close(ours: mx.array, theirs: mx.array) -> bool:
    return bool(mx.allclose(ours, theirs, rtol=1e-3, atol=1e-4))


class TestFastFunctions:
    @pytest.mark.parametrize("spread", [3, 40])
    def test_softmax(self, spread: float) -> None:
        mask = mx.triu(mx.full((8, 8), -1e9), k=1)
        scores = mx.random.normal((2, 3, 8, 8)) * spread + mask
        weights = mx.random.normal((2, 3, 8, 8))

        def exact(x: mx.array) -> mx.array:
            return (mx.softmax(x, axis=-1) * weights).sum()

        def fast(x: mx.array) -> mx.array:
            return (demo.softmax(x) * weights).sum()

        assert close(fast(scores), exact(scores))
        assert close(mx.grad(fast)(scores), mx.grad(exact)(scores))

    @pytest.mark.parametrize("spread", [3, 40])
    def test_swiglu(self, spread: float) -> None:
        gate, up, weights = (mx.random.normal((16, 16)) for _ in range(3))
        gate = gate * spread

        def exact(g: mx.array, u: mx.array) -> mx.array:
            return (nn.silu(g) * u * weights).sum()

        def fast(g: mx.array, u: mx.array) -> mx.array:
            return (demo.swiglu(g, u) * weights).sum()

        pairs = zip(mx.grad(fast, (0, 1))(gate, up), mx.grad(exact, (0, 1))(gate, up), strict=True)
        assert all(close(ours, theirs) for ours, theirs in pairs)

    @pytest.mark.parametrize("spread", [3, 40])
    def test_logsumexp(self, spread: float) -> None:
        logits, weights = mx.random.normal((6, 40)) * spread, mx.random.normal((6,))

        def exact(x: mx.array) -> mx.array:
            return (mx.logsumexp(x, axis=-1) * weights).sum()

        def fast(x: mx.array) -> mx.array:
            return (demo.logsumexp(x) * weights).sum()

        assert close(fast(logits), exact(logits))
        assert close(mx.grad(fast)(logits), mx.grad(exact)(logits))


def test_only_what_the_assistant_says_is_learned(tokenizer) -> None:  # type: ignore[no-untyped-def]
    document = next(document for document in documents(1) if len(document) > 8)
    ids, weights = encode(tokenizer, document, limit=10_000)
    learned = tokenizer.decode(
        [token for token, weight in zip(ids, weights, strict=True) if weight],
        skip_special_tokens=False,
    )
    assert learned == "".join(text for text, expected in document if expected)


def test_batches_hold_whole_documents_and_their_next_tokens(tokenizer) -> None:  # type: ignore[no-untyped-def]
    for inputs, positions, targets, weights in itertools.islice(
        batches(tokenizer, 1, 2048, CONFIG.context, frozenset()), 20
    ):
        assert inputs.size <= 2048 * 1.2
        assert inputs.shape[1] <= CONFIG.context
        assert weights.min().item() > 0
        rows, flat = inputs.shape[1], np.array(inputs).reshape(-1)
        for position, target in zip(positions.tolist(), targets.tolist(), strict=True):
            last = (position + 1) % rows == 0 or flat[position + 1] == 0
            assert last or flat[position + 1] == target


def test_training_learns_resumes_and_exports(tmp_path: Path, tokenizer) -> None:  # type: ignore[no-untyped-def]
    def run_for(steps: int) -> Run:
        model = demo.Llama(CONFIG)
        demo.initialize(model, seed=1)
        run = Run(tmp_path, model, make_optimizer(5e-3, steps=30, decay=10))
        run.resume()
        source = batches(tokenizer, 1, 1024, CONFIG.context, frozenset())
        train(run, source, steps, mx.distributed.init(), log_every=5)
        return run

    run_for(15)
    run = run_for(30)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [5, 10, 15, 20, 25, 30]
    assert log[-1]["loss"] < log[0]["loss"] - 0.5

    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    export(tmp_path, tmp_path / "tiny.gguf", "tiny")
    llm = mlxrun.load(tmp_path / "tiny.gguf")
    ids = llm.tokenizer.encode("Tell me a story about a fox.")
    assert ids == tokenizer.encode("Tell me a story about a fox.").ids
    ours = run.model.logits(run.model(mx.array([ids])))[0]
    theirs = llm.logits(ids)
    # Q8_0 rounds the weights; rows of q or k in the wrong order would be off by much more.
    assert ((ours - theirs).square().mean() / ours.square().mean()).item() < 1e-3


def test_the_loss_of_a_new_model_is_that_of_guessing(tokenizer) -> None:  # type: ignore[no-untyped-def]
    model = demo.Llama(CONFIG)
    demo.initialize(model, seed=1)
    batch = next(batches(tokenizer, 1, 1024, CONFIG.context, frozenset()))
    assert loss(model, *batch).item() == pytest.approx(np.log(CONFIG.vocabulary), rel=0.1)
