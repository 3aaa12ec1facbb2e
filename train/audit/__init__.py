"""Audit of attention masks: compare what a model depends on with what its config allows."""
