"""Tiny random models of every architecture, checked against llama.cpp's logits."""
