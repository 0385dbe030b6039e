"""Models of every architecture, small enough for a test."""
