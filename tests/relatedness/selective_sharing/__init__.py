"""Tests of ``saliency_reg.relatedness.selective_sharing``."""
