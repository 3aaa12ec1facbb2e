"""Formulas in a plain form, each with the variants that are faster on some platforms."""
