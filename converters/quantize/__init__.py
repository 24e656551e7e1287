"""Weights into the forms that MLX computes with, and which form each of them takes."""
