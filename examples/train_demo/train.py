"""Train the demo model or its draft sibling with MLX.

`python -m examples.train_demo.train --out build/demo`. Each batch holds whole documents of about
the same length, padded on the right, so that no document sees another. The loss counts only what
the assistant says. A checkpoint is written every two minutes, and a run that was stopped goes on
from it. Several processes can share each step (README.md).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from tokenizers import Tokenizer

from .corpus import Document, documents, normalized
from .model import DEMO, DRAFT, Llama, initialize, logsumexp
from .questions import held_out_questions
from .tokenizer import train_tokenizer

Batch = tuple[mx.array, mx.array, mx.array, mx.array]
Encoded = tuple[list[int], list[float]]  # ids, and what each weighs in the loss
POOL = 512  # documents sorted by length at a time


def encode(tokenizer: Tokenizer, document: Document, limit: int) -> Encoded:
    """The document's ids and their weights, at most `limit` + 1 of them.

    A reply of n tokens weighs sqrt(n): a long story must not drown the short answers, whose few
    tokens say whether the question was understood. What the model need not say weighs nothing.
    """
    ids: list[int] = []
    weights: list[float] = []
    for text, wanted in document:
        piece = tokenizer.encode(text).ids
        ids += piece
        weights += [len(piece) ** -0.5 if wanted else 0.0] * len(piece)
    return ids[: limit + 1], weights[: limit + 1]


def batches(
    tokenizer: Tokenizer, seed: int, tokens: int, limit: int, held_out: frozenset[str]
) -> Iterator[Batch]:
    """Endless batches of about `tokens` tokens.

    Yields inputs (B, T), the N positions in the flattened inputs that count, the N targets and
    their N weights.
    """
    source = documents(seed, held_out)
    order = np.random.default_rng(seed)
    while True:
        pool = [encode(tokenizer, next(source), limit) for _ in range(POOL)]
        pool.sort(key=lambda document: len(document[0]))
        groups: list[list[Encoded]] = [[]]
        for document in pool:
            if groups[-1] and (len(groups[-1]) + 1) * len(document[0]) > tokens:
                groups.append([])
            groups[-1].append(document)
        for index in order.permutation(len(groups)):
            yield _batch(groups[index])


def _batch(group: list[Encoded]) -> Batch:
    length = -(-max(len(ids) - 1 for ids, _ in group) // 16) * 16
    inputs = np.zeros((len(group), length), np.int32)
    targets = np.zeros((len(group), length), np.int32)
    weights = np.zeros((len(group), length), np.float32)
    for row, (ids, weight) in enumerate(group):
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, : len(ids) - 1] = ids[1:]
        weights[row, : len(ids) - 1] = weight[1:]
    at = np.flatnonzero(weights)
    flat = targets.reshape(-1)[at], weights.reshape(-1)[at]
    return mx.array(inputs), mx.array(at), mx.array(flat[0]), mx.array(flat[1])


def loss(
    model: Llama, inputs: mx.array, positions: mx.array, targets: mx.array, weights: mx.array
) -> mx.array:
    """Weighted mean of the cross-entropy, in nats a token, over the positions that count."""
    hidden = model(inputs)
    logits = model.logits(hidden.reshape(-1, hidden.shape[-1])[positions])
    wanted = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return ((logsumexp(logits) - wanted) * weights).sum() / weights.sum()


def make_optimizer(peak: float, steps: int, decay: int) -> optim.Optimizer:
    """AdamW whose rate rises for 100 steps, stays, and falls in a line over the last `decay` steps.

    So a run can be cut short or made longer at any time: resume it with other `steps`.
    """

    def rate(step: mx.array) -> mx.array:
        falling = mx.maximum((steps - step) / decay, 0.01)
        return peak * mx.minimum(mx.minimum((step + 1) / 100, 1), falling)

    return optim.AdamW(rate, betas=[0.9, 0.99], weight_decay=0.01, bias_correction=True)


class Run:
    """A training run and its directory: its tokenizer, config, log and checkpoint."""

    def __init__(self, out: Path, model: Llama, optimizer: optim.Optimizer) -> None:
        self.out, self.model, self.optimizer = out, model, optimizer
        self.step, self.seconds = 0, 0.0

    def save(self) -> None:
        state = {f"model.{k}": v for k, v in tree_flatten(self.model.parameters())}
        state |= {f"optimizer.{k}": v for k, v in tree_flatten(self.optimizer.state)}
        partial = self.out / "partial.safetensors"
        mx.save_safetensors(
            str(partial), state, {"step": str(self.step), "seconds": str(self.seconds)}
        )
        partial.replace(self.out / "checkpoint.safetensors")

    def resume(self) -> bool:
        path = self.out / "checkpoint.safetensors"
        if not path.exists():
            return False
        state, meta = mx.load(str(path), return_metadata=True)
        for prefix, apply in (("model.", self.model.update), ("optimizer.", self._set_optimizer)):
            apply(
                tree_unflatten(
                    [(k.removeprefix(prefix), v) for k, v in state.items() if k.startswith(prefix)]
                )
            )
        self.step, self.seconds = int(meta["step"]), float(meta["seconds"])
        return True

    def _set_optimizer(self, state: dict) -> None:
        self.optimizer.state = state


def train(
    run: Run, source: Iterator[Batch], steps: int, group: mx.distributed.Group, log_every: int = 50
) -> None:
    step_function = nn.value_and_grad(run.model, loss)
    lead = group.rank() == 0
    began = saved = time.monotonic() - run.seconds
    losses, tokens, since = [], 0, time.monotonic()
    while run.step < steps:
        batch = next(source)
        value, gradients = step_function(run.model, *batch)
        gradients = nn.utils.average_gradients(gradients, group)
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        run.optimizer.update(run.model, gradients)
        mx.eval(value, run.model.parameters(), run.optimizer.state)
        run.step += 1
        run.seconds = time.monotonic() - began
        losses.append(value.item())
        tokens += batch[0].size * group.size()
        if lead and run.step % log_every == 0:
            speed = tokens / (time.monotonic() - since)
            entry = {
                "step": run.step,
                "loss": round(float(np.mean(losses)), 4),
                "tokens_per_second": round(speed),
                "seconds": round(run.seconds),
            }
            with (run.out / "log.jsonl").open("a") as log:
                log.write(json.dumps(entry) + "\n")
            print(entry, flush=True)
            losses, tokens, since = [], 0, time.monotonic()
        if lead and (time.monotonic() - saved > 120 or run.step == steps):
            run.save()
            saved = time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the run")
    parser.add_argument("--draft", action="store_true", help="the small sibling")
    parser.add_argument(
        "--tokenizer", type=Path, help="tokenizer.json of another run, to share its vocabulary"
    )
    parser.add_argument("--start", type=Path, help="checkpoint of another run to start from")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument(
        "--decay", type=int, default=500, help="steps over which the rates fall at the end"
    )
    parser.add_argument("--batch", type=int, default=2048, help="tokens a step")
    parser.add_argument(
        "--rate",
        type=float,
        default=2e-3,
        help="peak learning rate",
    )
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    group = mx.distributed.init()
    config = DRAFT if args.draft else DEMO
    args.out.mkdir(parents=True, exist_ok=True)
    vocabulary = args.tokenizer or args.out / "tokenizer.json"
    if vocabulary.exists():
        tokenizer = Tokenizer.from_file(str(vocabulary))
    else:
        tokenizer = train_tokenizer(config.vocabulary, args.seed)
    if group.rank() == 0:
        tokenizer.save(str(args.out / "tokenizer.json"))
        (args.out / "config.json").write_text(json.dumps(config.to_dict(), indent=1) + "\n")
    model = Llama(config)
    initialize(model, args.seed)
    run = Run(args.out, model, make_optimizer(args.rate, args.steps, args.decay))
    resumed = run.resume()
    if args.start and not resumed:
        state = mx.load(str(args.start))
        model.load_weights(
            [(k.removeprefix("model."), v) for k, v in state.items() if k.startswith("model.")]
        )
    held_out = frozenset(map(normalized, held_out_questions()))
    # A resumed run must not read again what it has read.
    seed = args.seed * 1_000_003 + run.step * 101 + group.rank()
    source = batches(tokenizer, seed, args.batch // group.size(), config.context, held_out)
    train(run, source, args.steps, group)


if __name__ == "__main__":
    main()
