"""Rows of one's own table with images, texts or features as inputs, and label columns as tasks."""
