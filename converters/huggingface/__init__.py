"""Model directories of Hugging Face and mlx-lm: read, mapped to our names, and written."""
