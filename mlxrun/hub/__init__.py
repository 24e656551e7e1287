"""From what users type to local files: a path, or a repository on the Hugging Face hub.

``names`` reads ``org/repo:QUANT``, ``choice`` picks files from a repository's list, ``fit`` says
what they take of this machine's memory, ``download`` fetches and verifies, ``source`` ties them
together.
``huggingface_hub`` is imported only when a hub name is used.
"""

from __future__ import annotations

from mlxrun.hub.source import Progress, pull, resolve

__all__ = ["Progress", "pull", "resolve"]
