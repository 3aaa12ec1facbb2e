"""Run from other models and other models from runs: import, export, fine-tuning."""
