"""Texts, their tokens, and batches of one task each."""
