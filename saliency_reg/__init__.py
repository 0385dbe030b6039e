"""Saliency-regularized multi-task learning (Bai and Zhao, KDD 2022) as a plug-in for any PyTorch model.

The public names are those listed here. The packages behind them, each importing only those before it: ``torch_tools`` (what
torch leaves open), ``distributed`` (joined over processes), ``relations`` (which tasks belong together), ``capture`` (what a
forward leaves behind), ``saliency`` (from there to distances), ``surgery`` (gradients between tasks), ``head_penalties`` (on
head weights), ``regularizer`` (the plug-in itself), ``relatedness`` (what follows from relations: groups of tasks),
``verification`` (whether all of that is right on your model).
``docs/how_it_works.md`` follows one training step through all of them.
"""

from typing import TYPE_CHECKING

from . import errors
from .errors import *  # noqa: F403
from .head_penalties import HeadPenalty
from .regularizer import RepMTL, SaliencyRegularizer
from .relatedness.branching import BranchingModel, BranchingRound, branch
from .relatedness.groups import (
    GroupSelection,
    GroupStability,
    best_groups,
    check_grouping,
    group_stability,
    task_groups,
)
from .relatedness.report import RelationReport, relation_report
from .relatedness.selective_sharing import SelectiveSharing, share_estimators
from .relatedness.views import RelationViews, ViewComparison, ViewKind, compare_views
from .relations import RelationWeights
from .report import RepMTLReport, SaliencyReport, SurgeryReport
from .saliency import task_distances, task_saliencies
from .surgery import PCGrad
from .surgery.feature import FeatureSurgery, GradNorm
from .surgery.parameters import ParameterSurgery
from .verification import VerificationReport, verify

__all__ = [
    "BranchingModel",
    "BranchingRound",
    "FeatureSurgery",
    "GradNorm",
    "GroupSelection",
    "GroupStability",
    "HeadPenalty",
    "PCGrad",
    "ParameterSurgery",
    "RelationReport",
    "RelationViews",
    "RelationWeights",
    "RepMTL",
    "RepMTLReport",
    "SaliencyRegularizer",
    "SaliencyReport",
    "SelectiveSharing",
    "SurgeryReport",
    "VerificationReport",
    "ViewComparison",
    "ViewKind",
    "best_groups",
    "branch",
    "check_grouping",
    "compare_views",
    "group_stability",
    "relation_report",
    "share_estimators",
    "task_distances",
    "task_groups",
    "task_saliencies",
    "verify",
]
__all__ += errors.__all__

if TYPE_CHECKING:
    __version__: str
else:  # for a type checker, every name would be there

    def __getattr__(name: str) -> str:
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        # Not at the top: it takes longer to import than half of this package.
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("saliency-reg")
        except PackageNotFoundError:  # a checkout that was not installed
            return "0.0.0"


def __dir__() -> list[str]:
    return [*__all__, "errors", "__version__", "__doc__", "__file__", "__path__"]
