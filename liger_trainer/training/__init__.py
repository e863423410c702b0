"""The recipe runner: recipes, data, training, fit, failures, checkpoints, throughput."""
