"""How fast a model runs here: workloads, the runtimes that run them, results as facts."""
