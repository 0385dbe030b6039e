"""Saliency maps of tasks over images."""
