"""The gradient estimate: reads a model and leaves it as it was."""
