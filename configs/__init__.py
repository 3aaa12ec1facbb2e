"""Experiments: values only."""
