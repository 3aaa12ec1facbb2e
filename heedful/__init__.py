"""Transformers in JAX and Flax that are right, fast and reproducible, from one CPU to a TPU pod."""

__version__ = "0.1.0"
