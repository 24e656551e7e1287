"""Bytes that a decode step reads as the context grows, dense and sparse, and the error of logits.

    python -m examples.long_context                   # a model of random weights, 1K to 32K tokens
    python -m examples.long_context --demo            # the demo model, on chats that it never saw
    python -m examples.long_context MODEL --text FILE --lengths 4096,16384 --patterns blocks:32x64

A text is prefilled up to each length; the tokens after it go through the model one by one, as in
decoding. ``read_bytes`` counts the bytes of keys, values and bounds that are read. The logits are
compared with those of dense attention: KL divergence in nats and how often both rank the same token
first, over those tokens. ``mlxrun bench --context 1k,8k --attention PATTERN`` measures the time.

With random weights attention is flat: all tokens weigh the same. The error is then a worst case for
patterns that leave most tokens out, not that of a text.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import mlxrun  # first: it finds a BLAS for MLX

import mlx.core as mx  # isort: skip

from mlxrun.config import DEFAULT_CACHE, CacheConfig
from mlxrun.eval.kl_divergence import kl_divergence
from mlxrun.eval.perplexity import softmax
from mlxrun.kv_cache.base import KVCache
from mlxrun.kv_cache.factory import read_bytes
from mlxrun.models.transformer import Transformer

from .kv_formats import chats
from .make_random_gguf import SHAPES, write

DEMO = Path(mlxrun.__file__).parent / "assets" / "demo.gguf"
CHUNK = 512
LONG = ("1024,2048,4096,8192,16384,32768", "dense,window:1024+4,strided:512/8,blocks:32x64")
SHORT = (
    "256,512,960",
    "dense,window:188+4,strided:64/8,blocks:8x16,window:296+4,blocks:16x16,blocks:8x32",
)


class Row(NamedTuple):
    """The cost of one pattern at one length.

    Attributes:
        length: tokens of the prompt.
        pattern: as it is written.
        read: bytes of keys, values and bounds that the last token reads.
        divergence: from the dense distribution, in nats, the mean.
        agreement: the share of tokens after which both rank the same one first.
    """

    length: int
    pattern: str
    read: int
    divergence: float
    agreement: float


class Reader:
    """Caches that a text is prefilled into, chunk by chunk."""

    def __init__(self, model: Transformer, config: CacheConfig) -> None:
        self._model, self.length = model, 0
        self.cache = model.make_cache(CacheConfig(window=config.window, keep=config.keep))

    def read(self, ids: Sequence[int], length: int) -> None:
        """Prefill up to a length."""
        for start in range(self.length, length, CHUNK):
            part = mx.array([ids[start : min(start + CHUNK, length)]])
            self._model(part, self.cache, last_only=True)
            mx.eval([array for layer in self.cache for array in layer.state])
        self.length = length

    def as_config(self, config: CacheConfig) -> list[KVCache]:
        """Caches of a pattern with the same tokens: all patterns prefill prompts the same way."""
        if config.sparse is None:
            return [layer.fork() for layer in self.cache]
        made = self._model.make_cache(config)
        for mine, its in zip(self.cache, made, strict=True):
            its.restore([mine.slice_tokens(0, self.length)], mine.snapshot(), self.length)
        return made


def measure(
    model: Transformer, ids: Sequence[int], lengths: Sequence[int], patterns: Sequence[str], n: int
) -> Iterator[Row]:
    """Rows of all patterns at one length after the other; ``n`` tokens are decoded at each."""
    configs = {name: CacheConfig(attention=name) for name in patterns}
    windows = {(each.window, each.keep): Reader(model, each) for each in configs.values()}
    whole = windows.setdefault((None, 0), Reader(model, DEFAULT_CACHE))
    layers = [(one.attention.cache_shape, one.attention.window) for one in model.config.layers]
    for length in lengths:
        for reader in windows.values():
            reader.read(ids, length)
        dense = _Decoding(model, whole.as_config(DEFAULT_CACHE))
        decodings = {
            name: _Decoding(model, windows[each.window, each.keep].as_config(each))
            for name, each in configs.items()
        }
        for decoding in (dense, *decodings.values()):
            decoding.decode(ids[length : length + n])
        for name, each in configs.items():
            decoding, read = decodings[name], read_bytes(each, layers, model.dtype, length + n)
            yield Row(length, name, read, *decoding.error(dense))


class _Decoding:
    """Decoding with one pattern: the logits of tokens that go through the model one by one."""

    def __init__(self, model: Transformer, cache: list[KVCache]) -> None:
        self._model, self._cache = model, cache
        self._rows: list[mx.array] = []

    def decode(self, tokens: Sequence[int]) -> None:
        """Decode more tokens."""
        for token in tokens:
            logits = self._model(mx.array([[token]]), self._cache)[0, -1].astype(mx.float32)
            mx.eval(logits, [array for layer in self._cache for array in layer.state])
            self._rows.append(logits)

    def error(self, dense: _Decoding) -> tuple[float, float]:
        """KL divergence from another's distributions, and agreement on the first token."""
        got, expected = mx.stack(self._rows), mx.stack(dense._rows)  # (T, V)
        divergence = kl_divergence(softmax(expected), softmax(got)).mean()
        same = (mx.argmax(got, axis=-1) == mx.argmax(expected, axis=-1)).mean()
        return float(divergence.item()), float(same.item())


def long_text(llm: mlxrun.LLM, path: Path | None, length: int, *, demo: bool) -> list[int]:
    """Token ids: of a file, of chats of the demo's corpus one after the other, or random ones."""
    if path:
        return llm.tokenizer.encode(path.read_text(encoding="utf-8"))
    if demo:
        return [token for chat in chats(llm, 12) for token in chat.ids]
    return np.random.default_rng(0).integers(259, llm.model.vocab_size, length).tolist()


def report(llm: mlxrun.LLM, ids: Sequence[int], arguments: argparse.Namespace) -> None:
    """Print a row for each length and pattern."""
    lengths = [int(length) for length in arguments.lengths.split(",")]
    short = max(lengths) + arguments.tokens - len(ids)
    if short > 0:
        raise SystemExit(f"the text has {len(ids)} tokens, {short} too few for these lengths")
    print("| tokens so far | attention | MB read | KL, nats | same first token |")
    print("|---|---|---|---|---|")
    patterns = arguments.patterns.split(",")
    for row in measure(llm.model, ids, lengths, patterns, arguments.tokens):
        print(
            f"| {row.length:,} | {row.pattern} | {row.read / 1e6:.2f} | "
            f"{row.divergence:.2g} | {row.agreement:.0%} |",
            flush=True,
        )


def main(written: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="by default one of random weights")
    parser.add_argument("--demo", action="store_true", help="the demo model")
    parser.add_argument("--text", type=Path, help="to read; by default random tokens")
    parser.add_argument("--lengths", help=f"{LONG[0]}; of the demo {SHORT[0]}")
    parser.add_argument("--patterns", help=f"{LONG[1]}; of the demo {SHORT[1]}")
    parser.add_argument("--tokens", type=int, default=32, help="decoded at each length (32)")
    arguments = parser.parse_args(written)
    lengths, patterns = SHORT if arguments.demo else LONG
    arguments.lengths, arguments.patterns = (
        arguments.lengths or lengths,
        arguments.patterns or patterns,
    )
    with tempfile.TemporaryDirectory() as folder:
        source = DEMO if arguments.demo else arguments.model
        if source is None:
            source = Path(folder) / "long.gguf"
            write(SHAPES["long"], str(source))
        llm = mlxrun.load(source)
        if not isinstance(llm.model, Transformer):
            parser.error("mlx-lm's classes attend to all cached tokens")
        length = max(map(int, arguments.lengths.split(","))) + arguments.tokens
        report(llm, long_text(llm, arguments.text, length, demo=arguments.demo), arguments)


if __name__ == "__main__":
    main()
