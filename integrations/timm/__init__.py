"""timm: multi-task models from any of its backbones, and the regularizer on its classifiers.

>>> from saliency_reg.integrations.timm import HeadConfig, TimmMultiTaskModel, parameter_groups
"""

from .errors import (
    AttentionInTheWayError,
    CheckpointError,
    CheckpointNotFoundError,
    ClassifierNotFoundError,
    FeatureNotFoundError,
    ImageSizeError,
    NoSpatialFeatureError,
    PretrainedWeightsError,
    UnknownModelError,
)
from .head_config import HeadConfig
from .model import TimmMultiTaskModel
from .parameter_groups import parameter_groups

__all__ = [
    "AttentionInTheWayError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "ClassifierNotFoundError",
    "FeatureNotFoundError",
    "HeadConfig",
    "ImageSizeError",
    "NoSpatialFeatureError",
    "PretrainedWeightsError",
    "TimmMultiTaskModel",
    "UnknownModelError",
    "parameter_groups",
]
