"""Every known architecture as a row of a table; a new one is a row in its family's file."""

from __future__ import annotations

from converters.architectures import (
    cohere,
    deepseek,
    dense,
    gemma,
    glm,
    gpt,
    granite,
    linear_attention,
    llama,
    moe,
    olmo,
    phi,
    qwen,
    ssm,
)
from converters.architectures.base import ENDS, Architecture

ARCHITECTURES: dict[str, Architecture] = {
    **llama.ROWS,
    **qwen.ROWS,
    **gemma.ROWS,
    **phi.ROWS,
    **glm.ROWS,
    **cohere.ROWS,
    **olmo.ROWS,
    **gpt.ROWS,
    **dense.ROWS,
    **ssm.ROWS,
    **granite.ROWS,
    **deepseek.ROWS,
    **moe.ROWS,
    **linear_attention.ROWS,
}

__all__ = ["ARCHITECTURES", "ENDS", "Architecture"]
