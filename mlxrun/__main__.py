"""``python -m mlxrun`` is the command ``mlxrun``."""

from __future__ import annotations

from mlxrun.cli.main import main

if __name__ == "__main__":
    main()
