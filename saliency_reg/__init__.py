"""Saliency-regularized multi-task learning (Bai and Zhao, KDD 2022) as a plug-in for any PyTorch model."""

from importlib.metadata import PackageNotFoundError, version

from .errors import SaliencyRegError
from .regularizer.regularizer import SaliencyRegularizer
from .relations.weights import RelationWeights
from .report import SaliencyReport
from .saliency.distances import task_distances
from .saliency.task_saliencies import task_saliencies
from .surgery.feature.feature_surgery import FeatureSurgery
from .surgery.parameters.parameter_surgery import ParameterSurgery
from .surgery.weighting import PCGrad
from .surgery_report import SurgeryReport

__all__ = [
    "FeatureSurgery",
    "PCGrad",
    "ParameterSurgery",
    "RelationWeights",
    "SaliencyRegError",
    "SaliencyRegularizer",
    "SaliencyReport",
    "SurgeryReport",
    "task_distances",
    "task_saliencies",
]

try:
    __version__ = version("saliency-reg")
except PackageNotFoundError:  # a checkout that was not installed
    __version__ = "0.0.0"
