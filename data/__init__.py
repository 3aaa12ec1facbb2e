"""Data: convert texts to the arrays that a model is trained on. Nothing here imports jax."""
