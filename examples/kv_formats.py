"""The cost of each type of key/value cache: bytes, error of attention, perplexity.

    python -m examples.kv_formats                     # the demo model on chats that it never saw
    python -m examples.kv_formats MODEL --text examples/kv_formats.txt
    python -m examples.kv_formats MODEL --text FILE --types q8 q8:q4 q4c:q4

A type is ``KEYS:VALUES``, or one name for both. The error is the relative root mean square
difference of attention's output, over all heads, layers and tokens, from the same queries, keys
and values. Perplexity is that of the text in chunks as long as the model's context; in the demo's
chats, only the assistant's tokens count. (`mlxrun compare` compares a type of cache with a plain
one on any model and text; this prints bytes and attention's error as well.)
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import mlxrun  # first: it finds a BLAS for MLX

import mlx.core as mx  # isort: skip

from mlxrun.config import CacheConfig
from mlxrun.errors import MlxrunError
from mlxrun.eval.perplexity import logits_of, softmax
from mlxrun.kv_cache.factory import token_bytes
from mlxrun.models.transformer import Transformer

from .attention_error import attention_error

DEMO = Path(mlxrun.__file__).parent / "assets" / "demo.gguf"
SEED = 20_000  # of chats outside of the training set
LONG = 192  # tokens of a chat that fills a few groups
TYPES = (
    *("f16", "bf16", "q8", "mxfp8", "q6", "q5", "q4", "q3", "q2"),
    *("q8:q4", "q4:q8", "q4c/32:q8", "q3c/32:q8", "q2c/32:q8", "q2:q8", "q2c/32:q4"),
)


class TextChunk(NamedTuple):
    """A text's token ids, and which of them count for perplexity."""

    ids: list[int]
    counted: list[bool]


def chunks_of(llm: mlxrun.LLM, path: Path) -> list[TextChunk]:
    """A file, cut to the model's context."""
    ids, length = llm.tokenizer.encode(path.read_text(encoding="utf-8")), llm.context_length
    cut = [ids[start : start + length] for start in range(0, len(ids), length)]
    return [TextChunk(part, [True] * len(part)) for part in cut if len(part) > 1]


def chats(llm: mlxrun.LLM, count: int) -> list[TextChunk]:
    """Long chats of the demo model's corpus."""
    from .train_demo.corpus import documents

    found: list[TextChunk] = []
    for document in itertools.islice(documents(SEED), 10 * count):
        chunk = TextChunk([], [])
        for text, learned in document:
            ids = llm.tokenizer.encode(text, parse_special=True)
            chunk.ids.extend(ids)
            chunk.counted.extend([learned] * len(ids))
        if LONG <= len(chunk.ids) <= llm.context_length:
            found.append(chunk)
    return found[:count]


def perplexity(llm: mlxrun.LLM, chunks: Sequence[TextChunk], config: CacheConfig) -> float:
    """Of all tokens that count, with keys and values of some types."""
    nlls = [_nll(llm, chunk, config) for chunk in chunks]
    return math.exp(sum(nlls) / sum(sum(chunk.counted[1:]) for chunk in chunks))


def _nll(llm: mlxrun.LLM, chunk: TextChunk, config: CacheConfig) -> float:
    """The sum of negative log-likelihoods, in nats."""
    parts = logits_of(llm, config, chunk.ids, 0)
    each = mx.concatenate([softmax(logits).nll(targets) for logits, targets in parts])
    return float((each * mx.array(chunk.counted[1:])).sum().item())


def report(llm: mlxrun.LLM, chunks: Sequence[TextChunk], types: Sequence[str]) -> None:
    """Print a row for each pair of types, written as ``q8:q4``."""
    model = llm.model
    assert isinstance(model, Transformer)
    shapes = [layer.attention.cache_shape for layer in model.config.layers]
    plain = perplexity(llm, chunks, CacheConfig())
    size = sum(token_bytes(shapes, model.dtype, CacheConfig()))
    print("  keys  values  bytes/token    error  perplexity   change")
    print(f"{'plain':>6}  {'plain':>6}  {size:>11,}  {0:>7.4f}  {plain:>10.4f}")
    for written in types:
        keys, _, values = written.partition(":")
        name = f"{keys:>6}  {values or keys:>6}"
        try:
            config = CacheConfig(cache_type_k=keys, cache_type_v=values or keys)
            squares = [attention_error(model, chunk.ids, [config])[0] ** 2 for chunk in chunks]
        except MlxrunError as error:
            print(f"{name}  {error}")
            continue
        size = sum(token_bytes(shapes, model.dtype, config))
        off, got = math.sqrt(sum(squares) / len(squares)), perplexity(llm, chunks, config)
        print(
            f"{name}  {size:>11,}  {off:>7.4f}  {got:>10.4f}  {got / plain - 1:>+7.2%}", flush=True
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(DEMO))
    parser.add_argument("--text", type=Path, help="by default chats of the demo model's corpus")
    parser.add_argument("--types", nargs="+", default=TYPES, metavar="KEYS:VALUES")
    parser.add_argument("--chats", type=int, default=24, help="how many (24)")
    options = parser.parse_args(arguments)
    llm = mlxrun.load(options.model)
    if not isinstance(llm.model, Transformer):
        parser.error("mlx-lm's classes store keys and values in their own way")
    chunks = chunks_of(llm, options.text) if options.text else chats(llm, options.chats)
    tokens = sum(len(chunk.ids) for chunk in chunks)
    print(f"{Path(options.model).name}: {tokens} tokens in {len(chunks)} chunks, {llm.model.dtype}")
    report(llm, chunks, options.types)


if __name__ == "__main__":
    main()
