"""Rotations against their definition, and against mlx-lm's for every scaling."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxrun.models.config import Rope
from mlxrun.models.decoder import rope_of
from mlxrun.models.rope import rotation


def naive(x: np.ndarray, rope: Rope, offset: int) -> np.ndarray:
    """Rotate pairs of x (B, H, T, D) by position times inverse frequency."""
    half = rope.dims // 2
    inverse = rope.base ** (-np.arange(0, rope.dims, 2) / rope.dims)
    inverse = inverse / (np.ones(half) if rope.factors is None else np.array(rope.factors))
    angles = (offset + np.arange(x.shape[2]))[:, None] * rope.scale * inverse
    if rope.traditional:
        first, second = np.s_[..., 0 : rope.dims : 2], np.s_[..., 1 : rope.dims : 2]
    else:
        first, second = np.s_[..., :half], np.s_[..., half : rope.dims]
    out = x.copy()
    out[first] = x[first] * np.cos(angles) - x[second] * np.sin(angles)
    out[second] = x[first] * np.sin(angles) + x[second] * np.cos(angles)
    return out


@given(
    half=st.integers(1, 16),
    rest=st.sampled_from([0, 2, 16]),
    offset=st.integers(0, 300),
    scale=st.sampled_from([1.0, 0.25]),
    factors=st.booleans(),
    traditional=st.booleans(),
    tokens=st.integers(1, 6),
)
def test_rotation_by_definition(
    half: int, rest: int, offset: int, scale: float, factors: bool, traditional: bool, tokens: int
) -> None:
    stretched = tuple(np.linspace(1, 8, half)) if factors else None
    rope = Rope(2 * half, 10000.0, scale, stretched, traditional)
    shape = (2, 3, tokens, 2 * half + rest)
    x = np.random.default_rng(half).standard_normal(shape).astype(np.float32)
    got = np.array(rotation(rope)(mx.array(x), offset))
    np.testing.assert_allclose(got, naive(x.astype(np.float64), rope, offset), atol=2e-4)


def test_no_rope_leaves_everything_alone() -> None:
    x = mx.random.normal((1, 2, 3, 4))
    assert mx.array_equal(rotation(None)(x, 17), x)


def test_rows_have_offsets_of_their_own() -> None:
    rotate = rotation(Rope(8))
    x = mx.random.normal((3, 2, 1, 8), key=mx.random.key(0))
    got = rotate(x, mx.array([0, 5, 70]))
    for row, offset in enumerate((0, 5, 70)):
        one = x[row : row + 1]
        np.testing.assert_allclose(np.array(got[row]), np.array(rotate(one, offset)[0]), atol=1e-6)


SCALINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "linear": {"type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
    "yarn with betas": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 1024,
        "beta_fast": 16, "beta_slow": 2,
    },
    "yarn with scales": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256,
        "mscale": 0.7, "mscale_all_dim": 1.2,
    },
    "longrope": {
        "rope_type": "longrope", "original_max_position_embeddings": 512,
        "short_factor": [1.0] * 16, "long_factor": list(np.linspace(1, 9, 16)),
    },
}  # fmt: skip


@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize("name", SCALINGS)
def test_scalings_rotate_as_mlx_lm_does(name: str, base: float) -> None:
    from mlx_lm.models.rope_utils import initialize_rope

    context, scaling = 2048, SCALINGS[name]
    config = {
        "rope_theta": base,
        "max_position_embeddings": context,
        "rope_scaling": scaling or None,
    }
    rope = rope_of(config, 32)
    theirs = initialize_rope(32, base, False, scaling or None, context)
    x = mx.random.normal((1, 2, 40, 32), key=mx.random.key(1))
    ours = rope.attention_factor * rotation(rope)(x, 7)
    np.testing.assert_allclose(np.array(ours), np.array(theirs(x, offset=7)), atol=1e-4)


def test_a_stated_attention_factor_is_taken() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "attention_factor": 3.0, "mscale": 0.7}
    assert rope_of({"rope_scaling": scaling}, 32).attention_factor == 3.0


def test_yarns_bounds_may_lie_between_dimensions() -> None:
    """transformers' ``truncate``: false keeps the ramp's ends where the formula puts them."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    rope = rope_of({"rope_scaling": scaling | {"truncate": False}}, 32)
    low, high = (
        32 * np.log(256 / (turns * 2 * np.pi)) / (2 * np.log(10000.0)) for turns in (32, 1)
    )
    ramp = np.clip((np.arange(16) - max(low, 0)) / (high - max(low, 0)), 0, 1)
    np.testing.assert_allclose(rope.factors or (), 1 / (1 - ramp + ramp / 4), rtol=1e-12)
    assert rope != rope_of({"rope_scaling": scaling}, 32)
