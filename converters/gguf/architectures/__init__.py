"""Every architecture that is known, as a row of a table. To add one, add its row to a file here."""

from __future__ import annotations

from converters.gguf.architectures.borrowed import BORROWED
from converters.gguf.architectures.dense import DENSE
from converters.gguf.architectures.experts import EXPERTS
from converters.gguf.architectures.foreign import FOREIGN
from converters.gguf.architectures.gemma import GEMMA
from converters.gguf.architectures.gpt import GPT
from converters.gguf.architectures.granite import GRANITE
from converters.gguf.architectures.recurrent import RECURRENT
from converters.gguf.architectures.row import ENDS, Architecture
from converters.gguf.architectures.uneven import UNEVEN

ARCHITECTURES: dict[str, Architecture] = {
    **DENSE,
    **BORROWED,
    **GEMMA,
    **GPT,
    **GRANITE,
    **FOREIGN,
    **UNEVEN,
    **EXPERTS,
    **RECURRENT,
}

__all__ = ["ARCHITECTURES", "ENDS", "Architecture"]
