"""What a model consists of, costs and attends to."""
