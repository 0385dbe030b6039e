"""Encoders of the transformers library, built tiny and with random weights."""
