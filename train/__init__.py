"""Training: sharding, state, step, loop, checkpoints, evaluation and the command line."""
