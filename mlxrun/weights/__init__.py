"""Weights in any MLX layout, and how a model asks for them by name."""
