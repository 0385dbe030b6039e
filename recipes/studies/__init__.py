"""Comparisons: methods by data by seeds, tuned on validation alone, reported once on test."""
