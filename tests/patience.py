"""How long tests wait, in seconds, for what must come: a bound against hanging, not a measure.

Enough for a loaded machine that compiles its first kernels meanwhile.
"""

PATIENCE = 300.0
