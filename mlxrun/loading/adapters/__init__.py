"""LoRA adapters in the formats that users have, fitted to a model."""

from mlxrun.loading.adapters.adapters import AdapterChoice, Adapters, listed, read_adapters
from mlxrun.loading.adapters.merge import merging

__all__ = ["AdapterChoice", "Adapters", "listed", "merging", "read_adapters"]
