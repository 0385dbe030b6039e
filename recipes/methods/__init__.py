"""The methods that are compared, each once, and what they add to a training step."""
