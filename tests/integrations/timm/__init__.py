"""The timm integration, on real timm models with random weights."""
