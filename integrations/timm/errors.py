"""Errors of the timm integration. Every message says what was found, what was expected, and what to use instead."""

from __future__ import annotations

from ...errors import ModuleNotFoundInModelError, SaliencyRegError, ShapeError


class UnknownModelError(SaliencyRegError, LookupError):
    """timm has no model of this name, or no such pretrained tag."""


class PretrainedWeightsError(SaliencyRegError, RuntimeError):
    """Pretrained weights do not exist, or could not be downloaded."""


class CheckpointError(SaliencyRegError, ValueError):
    """A file of weights or of a configuration is not whole, or belongs to another architecture."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """A file of weights or of a configuration is missing."""


class ImageSizeError(ShapeError):
    """The backbone cannot process images of this size."""


class NoSpatialFeatureError(SaliencyRegError, ValueError):
    """A feature has no positions in the image, or none that the outputs depend on."""


class ClassifierNotFoundError(ModuleNotFoundInModelError):
    """A timm model has no classifier, or none whose output could be told."""


class FeatureNotFoundError(ModuleNotFoundInModelError):
    """No module returns the feature map that was asked for."""
