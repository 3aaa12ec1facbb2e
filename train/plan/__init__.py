"""Plan a training step from its compiled program: memory, communication and time."""
