"""The demo model's vocabulary: byte-level BPE trained on the corpus, with ChatML's markers."""

from __future__ import annotations

import itertools

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from .corpus import END_OF_TEXT, IM_END, IM_START, documents

SPECIAL = (END_OF_TEXT, IM_START, IM_END)  # ids 0, 1, 2
# How text is cut before merging: the pattern that GGUF files name "qwen2" (one digit a piece).
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(size: int, seed: int, count: int = 30_000) -> Tokenizer:
    """A tokenizer of `size` pieces, from `count` documents of the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = itertools.islice(documents(seed), count)
    texts = ("".join(text for text, _ in document) for document in sample)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
