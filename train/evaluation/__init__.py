"""Evaluation of trained models: losses, perplexity, scores."""
