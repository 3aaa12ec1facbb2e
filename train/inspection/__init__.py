"""Inspection of a model: its parts, its costs and its attention."""
