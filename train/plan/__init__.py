"""What a training step needs and how long it should take, from its compiler, before it runs."""
