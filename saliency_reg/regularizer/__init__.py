"""The plug-in itself."""

from .regularizer import SaliencyRegularizer

__all__ = ["SaliencyRegularizer"]
