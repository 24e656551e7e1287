"""Model directories as Hugging Face and mlx-lm write them: what they hold, and their conversion."""
