"""Masks that can be proven: what a model sees, against what its config says that it may see."""
