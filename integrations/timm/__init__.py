"""timm: multi-task models from any of its backbones, and the regularizer on its classifiers.

>>> from saliency_reg.integrations.timm import HeadConfig, TimmMultiTaskModel, parameter_groups
"""

from .classifier.classifier import find_classifier, find_feature
from .classifier.unmodified import saliency_regularizer
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
from .maps.saliency_maps import task_saliency_maps
from .model.head_config import HeadConfig
from .model.model import TimmMultiTaskModel
from .model.parameter_groups import parameter_groups

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
