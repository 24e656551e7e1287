"""mlxrun: run any GGUF model on Apple Silicon through MLX."""
