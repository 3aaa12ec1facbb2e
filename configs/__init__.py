"""Experiments: their modules hold values only."""
