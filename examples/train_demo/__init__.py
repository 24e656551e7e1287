"""How the demo model was made: its corpus, its training with MLX, its file, its examination."""

import mlxrun  # noqa: F401 - loads a fast BLAS on Linux, before MLX is imported
