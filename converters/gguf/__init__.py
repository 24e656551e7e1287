"""GGUF: header, block formats, names, configuration and vocabulary."""
