"""Quality of a model's output: perplexity, KL divergence of two models, batch invariance."""
