"""Models that this project does not define, through mlx-lm's model classes.

Only this package imports mlx-lm, and only when such a model is built: the import takes most of a
second. Code of a model directory is never run.
"""
