"""What one forward leaves behind."""
