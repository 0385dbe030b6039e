"""Saliency-regularized multi-task learning (Bai and Zhao, KDD 2022) as a plug-in for any PyTorch model."""

from importlib.metadata import PackageNotFoundError, version

from .distances import task_distances
from .errors import SaliencyRegError
from .feature_surgery import FeatureSurgery
from .parameter_surgery import ParameterSurgery
from .regularizer import SaliencyRegularizer
from .relations import RelationWeights
from .report import SaliencyReport
from .saliency import task_saliencies
from .surgery_report import SurgeryReport
from .weighting import PCGrad

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
