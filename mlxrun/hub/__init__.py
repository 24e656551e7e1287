"""Models by name: a local path, or ``org/repo:QUANT`` on the Hugging Face hub.

``huggingface_hub`` is imported only when a hub name is used.
"""

from __future__ import annotations

from mlxrun.hub.names import Progress
from mlxrun.hub.resolve import pull, resolve

__all__ = ["Progress", "pull", "resolve"]
