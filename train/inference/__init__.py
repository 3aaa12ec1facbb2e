"""Uses of a trained model: translation, generation, classification."""
