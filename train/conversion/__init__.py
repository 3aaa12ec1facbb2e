"""Import and export of models, and fine-tuning of pretrained models."""
