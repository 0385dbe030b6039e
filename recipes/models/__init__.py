"""Small networks that two cores can train, and encoders of texts."""
