"""How good a trained model is: losses, perplexity, scores."""
