"""Metadata that lies: each lie is refused with the key's name, the byte, and both values."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from gguf_builder import ARRAY, BOOL, F32, F64, I32, STRING, U8, U32, U64, Builder, Tensor, llama

from converters.errors import GGUFError
from converters.gguf.reader import read_gguf

TOKENS, SCORES = "tokenizer.ggml.tokens", "tokenizer.ggml.scores"
TYPES, MERGES = "tokenizer.ggml.token_type", "tokenizer.ggml.merges"

#: (key, type, value, expected, found)
LIES: list[tuple[str, int, Any, str, str]] = [
    ("general.architecture", U32, 3, "a string naming the model's family", "3"),
    ("general.architecture", STRING, "", "a string naming the model's family", "''"),
    ("general.architecture", ARRAY, (STRING, ["llama"]), "a string", "an array of 1"),
    ("llama.block_count", U32, 0, "an integer from 1 to 512", "0"),
    ("llama.block_count", U32, 4_000_000_000, "an integer from 1 to 512", "4000000000"),
    ("llama.block_count", U64, 2**64 - 1, "an integer from 1 to 512", str(2**64 - 1)),
    ("llama.block_count", STRING, "2", "an integer from 1 to 512", "'2'"),
    ("llama.block_count", F32, 2.0, "an integer from 1 to 512", "2.0"),
    ("llama.block_count", BOOL, 1, "an integer from 1 to 512", "True"),
    ("llama.block_count", ARRAY, (U32, [2, 2]), "an integer from 1 to 512", "an array of 2"),
    ("llama.context_length", U32, 0, "an integer from 1", "0"),
    ("llama.embedding_length", U32, 0, "an integer from 1", "0"),
    ("llama.embedding_length", I32, -32, "an integer from 1", "-32"),
    ("llama.embedding_length", U32, 64, "32, as token_embd.weight is 5 x 32", "64"),
    ("llama.features_length", U32, 64, "32, as token_embd.weight is 5 x 32", "64"),
    ("llama.vocab_size", U32, 6, "5, as token_embd.weight is 5 x 32", "6"),
    ("llama.feed_forward_length", STRING, "48", "an integer from 0", "'48'"),
    ("llama.feed_forward_length", ARRAY, (U32, [48]), "one number for each of the 2", "array of 1"),
    ("llama.feed_forward_length", ARRAY, (F32, [48, 48]), "for block 0", "48.0"),
    ("llama.feed_forward_length", ARRAY, (STRING, ["a", "b"]), "one for each", "an array of 2"),
    ("llama.attention.head_count", U32, 0, "at least one attention head", "0"),
    ("llama.attention.head_count", ARRAY, (U32, [0, 0]), "at least one", "an array of 2"),
    ("llama.attention.head_count", U32, 5, "a divisor", "2"),
    ("llama.attention.head_count", U32, 6, "a divisor of the embedding length 32", "6"),
    ("llama.attention.head_count", STRING, "4", "an integer from 0", "'4'"),
    ("llama.attention.head_count", ARRAY, (I32, [4, -4]), "for block 1", "-4"),
    ("llama.attention.head_count_kv", U32, 0, "at least one key-value head", "0"),
    ("llama.attention.head_count_kv", U32, 3, "a divisor of the 4 attention heads", "3"),
    ("llama.attention.head_count_kv", U32, 8, "a divisor of the 4 attention heads", "8"),
    ("llama.attention.head_count_kv", ARRAY, (U32, [2, 3]), "heads of block 1", "3"),
    ("llama.attention.key_length", U32, 0, "a head of at least 1 element", "0"),
    ("llama.rope.dimension_count", U32, 16, "at most 8, the size of a head", "16"),
    ("llama.rope.freq_base", F32, math.nan, "a finite number above 0", "nan"),
    ("llama.rope.freq_base", F32, math.inf, "a finite number above 0", "inf"),
    ("llama.rope.freq_base", F32, -1.0, "a finite number above 0", "-1.0"),
    ("llama.rope.freq_base", F32, 0.0, "a finite number above 0", "0.0"),
    ("llama.rope.freq_base", STRING, "1e4", "a finite number above 0", "'1e4'"),
    ("llama.rope.freq_base", F64, 1e308, "a finite number above 0", "1e+308"),
    ("llama.rope.freq_base", F64, 1e-308, "a finite number above 0", "1e-308"),
    ("llama.rope.scaling.yarn_beta_fast", F32, 0.0, "a finite number above 0", "0.0"),
    ("llama.rope.scaling.yarn_beta_slow", STRING, "1", "a finite number above 0", "'1'"),
    ("llama.rope.scaling.yarn_log_multiplier", ARRAY, (F32, [0.1]), "a finite", "an array of 1"),
    ("llama.rope.scaling.factor", F32, -2.0, "a finite number of at least 0", "-2.0"),
    ("llama.rope.scaling.factor", F64, math.inf, "a finite number of at least 0", "inf"),
    ("llama.rope.scaling.type", U32, 1, "a string", "1"),
    ("llama.attention.layer_norm_rms_epsilon", F32, math.nan, "of at least 0", "nan"),
    ("llama.attention.layer_norm_rms_epsilon", F32, -1e-5, "of at least 0", "-9.99999"),
    ("llama.final_logit_softcapping", F32, -math.inf, "a finite number", "-inf"),
    ("llama.some.factor", F32, math.nan, "a number", "NaN"),
    ("llama.some.factors", ARRAY, (F64, [1.0, math.nan]), "a number", "NaN"),
    ("llama.expert_count", U32, 2**31, "an integer from 0 to 65535", str(2**31)),
    ("llama.expert_used_count", U32, 5, "at most 4, the number of experts", "5"),
    ("llama.expert_used_count", ARRAY, (U32, [2, 5]), "at most 4, the number of experts", "5"),
    (TOKENS, STRING, "abcde", "an array of strings", "'abcde'"),
    (TOKENS, ARRAY, (U8, [1, 2, 3, 4, 5]), "an array of strings", "an array of 5"),
    (TOKENS, ARRAY, (ARRAY, [(STRING, ["a"])] * 5), "an array of strings", "an array of 5"),
    (TOKENS, ARRAY, (STRING, []), "an array of strings", "an array of 0"),
    (SCORES, ARRAY, (F32, [0.0] * 4), "an array of 5 numbers", "an array of 4"),
    (SCORES, ARRAY, (F32, [0.0] * 6), "an array of 5 numbers", "an array of 6"),
    (SCORES, ARRAY, (F32, [0.0, 0.0, 0.0, 0.0, math.nan]), "numbers", "NaN among them"),
    (SCORES, ARRAY, (STRING, ["0"] * 5), "an array of 5 numbers", "an array of 5"),
    (SCORES, ARRAY, (BOOL, [0] * 5), "an array of 5 numbers", "an array of 5"),
    (SCORES, F32, 0.0, "an array of 5 numbers", "0.0"),
    (TYPES, ARRAY, (I32, [1] * 4), "an array of 5 integers", "an array of 4"),
    (TYPES, ARRAY, (F32, [1] * 5), "an array of 5 integers", "an array of 5"),
    (MERGES, ARRAY, (I32, [1]), "an array of strings", "an array of 1"),
    (MERGES, STRING, "a b", "an array of strings", "'a b'"),
    ("tokenizer.ggml.bos_token_id", U32, 5, "the id of a token, an integer from 0 to 4", "5"),
    ("tokenizer.ggml.bos_token_id", U32, 2**32 - 1, "the id of a token", str(2**32 - 1)),
    ("tokenizer.ggml.eos_token_id", I32, -1, "the id of a token", "-1"),
    ("tokenizer.ggml.eos_token_id", STRING, "</s>", "the id of a token", "'</s>'"),
    ("tokenizer.ggml.fim_pre_token_id", U32, 9, "the id of a token", "9"),
    ("tokenizer.ggml.model", U32, 1, "a string", "1"),
    ("tokenizer.ggml.pre", BOOL, 1, "a string", "True"),
    ("tokenizer.chat_template", U32, 1, "a string", "1"),
    ("tokenizer.ggml.add_bos_token", U32, 1, "a boolean", "1"),
]


def write(folder: Path, b: Builder) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(b.build())
    return path


def refused(folder: Path, b: Builder) -> GGUFError:
    with pytest.raises(GGUFError) as caught:
        read_gguf(write(folder, b))
    return caught.value


@pytest.mark.parametrize(("key", "kind", "content", "expected", "found"), LIES)
def test_lies(tmp_path: Path, key: str, kind: int, content: Any, expected: str, found: str) -> None:
    b = llama().set(key, kind, content)
    error = refused(tmp_path, b)
    blamed = f"{key}_kv" if error.expected.startswith("a divisor of the 5") else key
    assert error.field == blamed
    assert error.offset == b.marks[f"value:{blamed}"]
    assert expected in error.expected and found in error.found


def test_no_architecture(tmp_path: Path) -> None:
    b = llama().drop("general.architecture")
    error = refused(tmp_path, b)
    assert (error.field, error.found) == ("general.architecture", "no such key")
    assert error.offset == b.marks["directory"]


def test_tokens_against_the_embedding(tmp_path: Path) -> None:
    b = llama().drop("llama.vocab_size", SCORES, TYPES)
    b.set(TOKENS, ARRAY, (STRING, ["a", "b", "c", "d"]))
    error = refused(tmp_path, b)
    assert (error.field, error.found) == (TOKENS, "4")
    assert error.expected == "5, as token_embd.weight is 5 x 32"


def test_embedding_of_another_rank(tmp_path: Path) -> None:
    b = llama()
    b.tensor("token_embd.weight").ne = [160]
    error = refused(tmp_path, b)
    assert error.field == "tensor token_embd.weight" and error.expected == "2 dimensions"
    assert error.offset == b.marks["tensor:token_embd.weight"]


def test_block_beyond_the_count(tmp_path: Path) -> None:
    b = llama().set("llama.block_count", U32, 1)
    error = refused(tmp_path, b)
    assert error.field == "tensor blk.1.ffn_gate_exps.weight"
    assert error.expected == "a block below llama.block_count, 1" and error.found == "block 1"
    assert error.offset == b.marks["tensor:blk.1.ffn_gate_exps.weight"]


HEADS, GROUPS = "llama.attention.head_count", "llama.attention.head_count_kv"


def state_space(b: Builder) -> Builder:
    return b.set("llama.ssm.state_size", U32, 16)


#: What looks odd and is true of some model.
TRUTHS: dict[str, Any] = {
    "one number for each block": lambda b: b.set(HEADS, ARRAY, (U32, [4, 8])).set(
        GROUPS, ARRAY, (I32, [2, 4])
    ),
    "a block without attention": lambda b: b.set(HEADS, ARRAY, (U32, [0, 4])).set(
        GROUPS, ARRAY, (U32, [0, 2])
    ),
    "a block without key-value heads": lambda b: b.set(GROUPS, ARRAY, (U32, [0, 2])),
    "state space without heads": lambda b: state_space(b).set(HEADS, U32, 0).set(GROUPS, U32, 0),
    "state space without head size": lambda b: (
        state_space(b)
        .drop(GROUPS)
        .set(HEADS, U32, 0)
        .set("llama.attention.key_length", U32, 0)
        .set("llama.attention.value_length", U32, 0)
    ),
    "state space without groups": lambda b: state_space(b).set(GROUPS, U32, 0),
    "heads alone": lambda b: b.drop(GROUPS),
    "groups alone": lambda b: b.drop(HEADS),
    "no heads": lambda b: b.drop(HEADS, GROUPS),
    "no block count": lambda b: b.drop("llama.block_count"),
    "head size given": lambda b: b.set(HEADS, U32, 6).set("llama.attention.key_length", U32, 64),
    "feed-forward of 0": lambda b: b.set("llama.feed_forward_length", ARRAY, (U32, [0, 48])),
    "scaling factor of 0": lambda b: b.set("llama.rope.scaling.factor", F32, 0.0),
    "integer for a real": lambda b: b.set("llama.rope.freq_base", U32, 10000),
    "minus infinity": lambda b: b.set("llama.kda.gate_lower_bound", F32, -math.inf),
    "no experts": lambda b: b.set("llama.expert_count", U32, 0),
    "experts used by block": lambda b: b.set("llama.expert_used_count", ARRAY, (U32, [0, 4])),
    "integer scores": lambda b: b.set(SCORES, ARRAY, (I32, [0] * 5)),
    "no merges": lambda b: b.set(MERGES, ARRAY, (STRING, [])),
    "no embedding length": lambda b: b.drop("llama.embedding_length"),
    "ids without a vocabulary": lambda b: b.drop(TOKENS).set(
        "tokenizer.ggml.eot_token_id", U32, 10**6
    ),
    "keys of another architecture": lambda b: b.set("qwen2.block_count", U32, 0),
    "features apart from the embedding": lambda b: b.set("llama.features_length", U32, 32).set(
        "llama.embedding_length", U32, 64
    ),
    "no embedding": lambda b: b.tensors.pop(0) and None,
}


@pytest.mark.parametrize("case", TRUTHS)
def test_truths(tmp_path: Path, case: str) -> None:
    b = llama()
    TRUTHS[case](b)
    assert read_gguf(write(tmp_path, b)).architecture == "llama"


@pytest.mark.parametrize("length", [0, 2, 1_000_000])
def test_numbers_for_blocks_that_are_not_counted(tmp_path: Path, length: int) -> None:
    b = llama().drop("llama.block_count").set(HEADS, ARRAY, (U32, [4] * length))
    error = refused(tmp_path, b)
    assert (error.field, error.found) == ("llama.block_count", "no such key")
    assert error.expected == f"a number of blocks, as {HEADS} has one number for each"
    assert error.offset == b.marks["directory"]


def test_first_lie_wins_whatever_the_order(tmp_path: Path) -> None:
    """A count that lies is named itself, not the per-block list that disagrees with it."""
    b = llama().set("llama.feed_forward_length", ARRAY, (U32, [48, 48]))
    b.set("llama.block_count", STRING, "2")
    b.tensors.append(Tensor("blk.7.x", [1], 4))
    assert refused(tmp_path, b).field == "llama.block_count"
