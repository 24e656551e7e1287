"""The transformer, its configuration and its loader."""
