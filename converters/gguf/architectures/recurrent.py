"""Architectures with a state instead of, or beside, keys and values."""

from __future__ import annotations

from converters.gguf.architectures.convolution import CONVOLUTION
from converters.gguf.architectures.hybrids import HYBRIDS
from converters.gguf.architectures.linear_attention import LINEAR_ATTENTION
from converters.gguf.architectures.linear_latent import LINEAR_LATENT
from converters.gguf.architectures.plamo2 import PLAMO2
from converters.gguf.architectures.row import Architecture
from converters.gguf.architectures.rwkv import RWKV7
from converters.gguf.architectures.state_space import STATE_SPACE

RECURRENT: dict[str, Architecture] = {
    **CONVOLUTION,
    **HYBRIDS,
    **LINEAR_ATTENTION,
    **LINEAR_LATENT,
    **STATE_SPACE,
    "plamo2": PLAMO2,
    "rwkv7": RWKV7,
}
