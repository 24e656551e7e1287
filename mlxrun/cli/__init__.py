"""The command line: one thin file per command over ``mlxrun.llm`` and ``mlxrun.conversion``."""
