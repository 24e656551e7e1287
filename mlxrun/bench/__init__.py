"""How fast a model runs here: workloads, what runs them, what was measured, and its tables."""
