"""Model types that only mlx-lm defines: the same logits as mlx-lm's, through our engine."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from foreign_models import CONFIGS, save, stock, stock_logits
from tiny_models import nmse

import mlxrun

TOKENS = [int(t) for t in np.random.default_rng(3).integers(3, 288, 40)]


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_mlx_lms_in_one_pass_in_chunks_and_token_by_token(
    tmp_path: Path, name: str
) -> None:
    model = stock(CONFIGS[name])
    llm = mlxrun.load(save(tmp_path / "m", CONFIGS[name], model))
    wanted = stock_logits(model, [TOKENS])
    assert np.array_equal(np.array(llm.logits(TOKENS)), wanted)
    for size in (7, 1):
        memory = llm.model.make_cache()
        parts = [TOKENS[i : i + size] for i in range(0, len(TOKENS), size)]
        logits = [llm.model(mx.array([part]), memory)[0] for part in parts]
        assert nmse(np.array(mx.concatenate(logits)), wanted) < 1e-8


@pytest.mark.parametrize("name", CONFIGS)
def test_a_conversation_gives_the_tokens_of_a_fresh_session(tmp_path: Path, name: str) -> None:
    llm = mlxrun.load(save(tmp_path / "m", CONFIGS[name], stock(CONFIGS[name])))
    session, prompt = llm.session(), TOKENS[:11]
    for turn in range(3):
        options = {"temperature": 0, "max_tokens": 70, "ignore_eos": True}
        reply = llm.generate(prompt, session=session, **options)
        assert reply.tokens == llm.generate(prompt, **options).tokens
        assert turn == 0 or reply.usage.cached_tokens >= len(prompt) - 8
        prompt = [*prompt, *reply.tokens, *TOKENS[turn : turn + 7]]
