"""How much memory a model takes while it runs, told before it does; see ``docs/memory.md``."""
