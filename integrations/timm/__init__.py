"""timm: multi-task models from any of its backbones, and the regularizer on its classifiers.

>>> from saliency_reg.integrations.timm import HeadConfig, TimmMultiTaskModel, parameter_groups
"""

from .classifier import find_classifier, find_feature
from .errors import (
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
from .saliency_maps import task_saliency_maps
from .unmodified import saliency_regularizer

__all__ = [
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
    "find_classifier",
    "find_feature",
    "parameter_groups",
    "saliency_regularizer",
    "task_saliency_maps",
]
