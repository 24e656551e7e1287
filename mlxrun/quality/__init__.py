"""What a model's quality is in numbers: perplexity of a text, divergence of one model from another.

Pure functions on logits, and the loops that read a text window by window. Knows nothing of files or
terminals.
"""
