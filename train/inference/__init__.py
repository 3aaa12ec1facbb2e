"""What a trained model is used for: translation, generation, classification."""
