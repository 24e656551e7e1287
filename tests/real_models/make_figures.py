"""Makes ``figures/NAME.json`` and ``figures/NAME.npz``: llama.cpp's word on a real model.

usage: PYTHON -m tests.real_models.make_figures [NAME ...]

with a PYTHON that has llama-cpp-python and the model's packages (``real_models.py`` names them).
llama.cpp's CPU backend rounds activations to eight bits where weights are quantized, so the figures
are of a float32 copy of the file, with a float32 KV cache and without flash attention: what the
weights of the file mean, as exactly as float32 says it. Shares no code with what is tested.

Kept are samples, not vocabularies: the JSON has what a person may want to read (settings, greedy
continuations, perplexities), the npz

* ``tokens``, ``lengths``: of each string without BOS, control tokens in it read as text;
* ``special_index``, ``special_tokens``, ``special_lengths``: of the strings that are other tokens
  where control tokens are read as such;
* ``story``: the story's tokens, BOS included, as far as they went through the model;
* ``surprises``: ``-ln p`` of each token of the story but the first;
* ``positions``, and at each of these ``logsumexp``, the largest logits (``top_tokens``,
  ``top_logits``), and ``sample_logits`` of ``sample_tokens``, chosen at random once.
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from tests.eval.make_figures import dequantized, mean
from tests.real_models.real_models import FIGURES, MODELS, RealModel
from tests.real_models.real_texts import PROMPTS, STORY, fingerprint, strings

CONTEXT = 1024
CONTINUATION = 32
# Tokens of the story that are kept: past gemma's window of 512.
STORY_TOKENS = {"smollm2": 600, "gemma": 700}
# The first tokens, those about a window's end and a prefill chunk's, and the last ones.
POSITIONS = (0, 1, 2, 7, 63, 200, 400, *range(508, 516), 550, 597, 598, 599, 650, 697, 698, 699)
LARGEST, SAMPLED = 16, 64
WINDOW = 256


class Judge:
    """A float32 copy of a model in llama.cpp."""

    def __init__(self, path: Path) -> None:
        self.llama = llama_cpp.Llama(
            str(path), n_ctx=CONTEXT, n_batch=CONTEXT, n_ubatch=512, logits_all=True,
            type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, flash_attn=False,
            verbose=False,
        )  # fmt: skip
        self.vocabulary = llama_cpp.llama_model_get_vocab(self.llama.model)

    def tokens(self, text: str, add_bos: bool = False, special: bool = False) -> list[int]:
        return list(self.llama.tokenize(text.encode(), add_bos=add_bos, special=special))

    def spell(self, tokens: Sequence[int]) -> bytes:
        """Their text, control tokens spelled out."""
        buffer = ctypes.create_string_buffer(512)
        spelled = b""
        for token in tokens:
            length = llama_cpp.llama_token_to_piece(self.vocabulary, token, buffer, 512, 0, True)
            assert length >= 0, token
            spelled += buffer.raw[:length]
        return spelled

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """After each token, float64 (T, V)."""
        self.llama.reset()
        self.llama.eval(tokens)
        return self.llama.scores[: len(tokens)].astype(np.float64)

    @property
    def bos(self) -> list[int]:
        expected = llama_cpp.llama_vocab_get_add_bos(self.vocabulary)
        return [llama_cpp.llama_vocab_bos(self.vocabulary)] if expected else []


def logsumexp(logits: np.ndarray) -> np.ndarray:
    largest = logits.max(axis=-1)
    return largest + np.log(np.exp(logits - largest[..., None]).sum(axis=-1))


def tokenization(judge: Judge) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What the strings become, four ways: with BOS or without, with control tokens or as text."""
    texts = strings()
    plain = [judge.tokens(text) for text in texts]
    special = [judge.tokens(text, special=True) for text in texts]
    for flag, each in ((False, plain), (True, special)):
        for text, tokens in zip(texts, each, strict=True):
            assert judge.tokens(text, add_bos=True, special=flag) == [*judge.bos, *tokens], text
    differ = [index for index, tokens in enumerate(plain) if special[index] != tokens]
    spelled = [judge.spell(tokens).decode(errors="replace") for tokens in plain]
    decoded = {
        str(index): spelled[index] for index, text in enumerate(texts) if spelled[index] != text
    }
    facts = {"strings": fingerprint(texts), "bos": judge.bos, "decoded": decoded}
    arrays = {
        "tokens": flat(plain),
        "lengths": np.array([len(tokens) for tokens in plain]),
        "special_index": np.array(differ),
        "special_tokens": flat([special[index] for index in differ]),
        "special_lengths": np.array([len(special[index]) for index in differ]),
    }
    return facts, arrays


def flat(rows: Sequence[Sequence[int]]) -> np.ndarray:
    return np.array([token for row in rows for token in row])


def continuation(judge: Judge, prompt: str) -> dict[str, Any]:
    """Greedy tokens, and how far the best was from the second best before each."""
    tokens, gaps = judge.tokens(prompt, add_bos=True, special=True), []
    start = len(tokens)
    judge.llama.reset()
    judge.llama.eval(tokens)
    while len(tokens) < start + CONTINUATION:
        logits = judge.llama.scores[len(tokens) - 1]
        second, best = np.sort(np.partition(logits, -2)[-2:])
        gaps.append(float(best - second))
        tokens.append(int(logits.argmax()))
        judge.llama.eval(tokens[-1:])
    completion = tokens[start:]
    ends = [llama_cpp.llama_vocab_is_eog(judge.vocabulary, token) for token in completion]
    return {
        "prompt": tokens[:start],
        "tokens": completion,
        "gaps": [round(gap, 4) for gap in gaps],
        "ends": ends.index(True) if True in ends else None,
        "text": judge.spell(completion).decode(errors="replace"),
    }


def story(judge: Judge, count: int, vocabulary: int) -> dict[str, np.ndarray]:
    """Logits past a window, few of them."""
    tokens = judge.tokens(STORY, add_bos=True)[:count]
    logits = judge.logits(tokens)
    totals = logsumexp(logits)
    positions = np.array([position for position in POSITIONS if position < count])
    chosen = logits[positions]
    top = np.argsort(-chosen, axis=-1)[:, :LARGEST]
    sample = np.random.default_rng(0).choice(vocabulary, SAMPLED, replace=False)
    return {
        "story": np.array(tokens),
        "surprises": (totals[:-1] - logits[np.arange(count - 1), tokens[1:]]).astype(np.float32),
        "positions": positions,
        "logsumexp": totals[positions],
        "top_tokens": top,
        "top_logits": np.take_along_axis(chosen, top, axis=-1).astype(np.float32),
        "sample_tokens": sample,
        "sample_logits": chosen[:, sample].astype(np.float32),
    }


def perplexity(judge: Judge) -> dict[str, Any]:
    """As llama-perplexity has it: the second half of each window but for its first token."""
    tokens = judge.tokens(STORY, add_bos=True)
    first, surprises = WINDOW // 2, []
    for start in range(0, len(tokens) - WINDOW + 1, WINDOW):
        window = tokens[start : start + WINDOW]
        targets = window[first + 1 :]
        window[: len(judge.bos)] = judge.bos
        logits = judge.logits(window)[first:-1]
        surprises.append(logsumexp(logits) - logits[np.arange(len(targets)), targets])
    scored = np.concatenate(surprises)
    return {
        "context": WINDOW,
        "tokens": len(scored),
        "perplexity": float(np.exp(scored.mean())),
        "surprise": mean(scored),
    }


def figures(model: RealModel, path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        judge = Judge(dequantized(path, Path(folder)))
    cuts, arrays = tokenization(judge)
    facts = {
        "about": f"llama-cpp-python {llama_cpp.__version__}, float32, CPU; see make_figures.py",
        "sha256": model.sha256,
        **cuts,
        "continuations": {name: continuation(judge, text) for name, text in PROMPTS.items()},
        "perplexity": perplexity(judge),
    }
    arrays |= story(judge, STORY_TOKENS[model.name], judge.llama.n_vocab())
    small = {n: a.astype(np.int32) if a.dtype.kind == "i" else a for n, a in arrays.items()}
    FIGURES.mkdir(exist_ok=True)
    np.savez_compressed(FIGURES / f"{model.name}.npz", **small)
    (FIGURES / f"{model.name}.json").write_text(dump(facts), encoding="utf-8")


def dump(facts: dict[str, Any]) -> str:
    """JSON with a line for each fact and each continuation."""
    lines = []
    for name, value in facts.items():
        text = json.dumps(value, ensure_ascii=False)
        if isinstance(value, dict):
            each = (
                f"  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in value.items()
            )
            text = "{\n" + ",\n".join(each) + "\n }"
        lines.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> None:
    for name in sys.argv[1:] or MODELS:
        model = MODELS[name]
        path = model.find()
        if path is None:
            sys.exit(f"{name} is not installed: {model.install}")
        figures(model, path)


if __name__ == "__main__":
    main()
