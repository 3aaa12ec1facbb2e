"""Measurements against peers; each script prints a table of ratios."""
