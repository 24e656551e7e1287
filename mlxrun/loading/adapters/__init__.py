"""LoRA adapters in the formats that users have, fitted to a model."""

from mlxrun.loading.adapters.adapters import AdapterChoice, Adapters, read_adapters

__all__ = ["AdapterChoice", "Adapters", "read_adapters"]
