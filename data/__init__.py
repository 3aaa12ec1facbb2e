"""From text to the arrays that a model is trained on. Never imports jax."""
