"""Tiny random models of every architecture, held to llama.cpp's logits."""
