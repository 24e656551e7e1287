"""Logits to sampled tokens."""
