"""Any timm model as a backbone: building it, the layout of its feature map, freezing."""

from .backbone import Backbone

__all__ = ["Backbone"]
