"""Foreign weights to MLX tensors: knows formats, knows nothing of generation."""
