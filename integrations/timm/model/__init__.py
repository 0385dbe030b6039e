"""A timm backbone with a head for each task."""

from .model import TimmMultiTaskModel

__all__ = ["TimmMultiTaskModel"]
