"""How long tests wait, in seconds, for what must come: a bound against hanging, not a measure.

Enough for a machine that is loaded several times over.
"""

PATIENCE = 300.0
