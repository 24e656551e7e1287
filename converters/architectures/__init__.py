"""A file per family of architectures: its tensor names and its hyperparameters."""
