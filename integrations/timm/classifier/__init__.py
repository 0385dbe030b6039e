"""The regularizer on the classifier of an unmodified timm model."""
