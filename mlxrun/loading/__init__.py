"""From files to models in memory: GGUF files and model directories."""
