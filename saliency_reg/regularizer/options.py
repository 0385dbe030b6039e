"""The settings of a regularizer: checked, described, and compared between processes in one place.

A new option is a field here, an argument of :class:`SaliencyRegularizer` of the same name, and its use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from ..capture import ColumnsChoice, Heads, HeadsChoice, resolve_heads
from ..errors import ConfigurationError, MissingArgumentError, TaskError, WrongTypeError
from ..relations import RelationWeights
from ..saliency import BOUNDED_METRICS, METRICS, REDUCTIONS, ScalarizeChoice, check_pool, check_scalarize
from ..surgery.feature import GradientCombiner
from ..tasks import check_task_names
from ..torch_tools import check_choice, non_negative_number, positive_number, whole_number
from .strength import AUTO, BACKBONE_SHARE, HEADS_SHARE

CROSS_SAMPLE = ("fix", "warn", "error", "ignore")
#: Options that each process may choose for itself; the seed in use is compared as a part of the state.
_MAY_DIFFER = ("cross_sample", "custom_backward", "seed")


@dataclass(frozen=True)
class Options:
    """The settings that :class:`SaliencyRegularizer` was given and keeps; see there. Each value is checked."""

    target: str
    strength: float | str
    metric: str
    pool: str | None
    reduction: str
    scalarize: ScalarizeChoice
    channel_axis: int | Sequence[int | None] | None
    warmup_steps: int
    start_step: int
    loss_reduction: str
    max_tasks_per_step: int | None
    seed: int
    run_all_heads: bool
    cross_sample: str
    check_finite: bool
    batch_axis: int | Sequence[int] = 0
    custom_backward: str = "warn"
    share: float | None = None

    def __post_init__(self) -> None:
        check_choice("metric", self.metric, tuple(METRICS))
        check_choice("reduction", self.reduction, REDUCTIONS)
        check_choice("cross_sample", self.cross_sample, CROSS_SAMPLE)
        check_choice("custom_backward", self.custom_backward, ("warn", "ignore"))
        check_scalarize(self.scalarize)
        check_pool(self.pool)
        for name, checked in {
            "strength": self._checked_strength(),
            "share": self._checked_share(),
            "warmup_steps": whole_number("warmup_steps", self.warmup_steps),
            "start_step": whole_number("start_step", self.start_step),
            "run_all_heads": bool(self.run_all_heads),
            "check_finite": bool(self.check_finite),
        }.items():
            object.__setattr__(self, name, checked)

    def _checked_strength(self) -> float | str:
        if isinstance(self.strength, str) and self.strength != AUTO:
            raise WrongTypeError(f"strength must be a number or 'auto', found {self.strength!r}.")
        return AUTO if self.strength == AUTO else non_negative_number("strength", self.strength)

    def _checked_share(self) -> float | None:
        if self.strength == AUTO and self.share is not None:
            return positive_number("share", self.share)
        if self.share is not None:
            raise ConfigurationError(
                f"share={self.share} says how large the penalty is to be, and strength={self.strength} says it, too. "
                "Leave one of them out."
            )
        return None

    def with_share(self, of_heads_alone: bool) -> Options:
        """Return them with the share of default, if ``strength="auto"`` has none."""
        if self.strength != AUTO or self.share is not None:
            return self
        return replace(self, share=HEADS_SHARE if of_heads_alone else BACKBONE_SHARE)

    @classmethod
    def among(cls, arguments: Mapping[str, Any]) -> Options:
        """Pick the fields among the arguments of a call."""
        return cls(**{field.name: arguments[field.name] for field in fields(cls) if field.name in arguments})

    def words(self) -> dict[str, Any]:
        """What has to be the same in all processes."""
        words = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _MAY_DIFFER}
        if not isinstance(self.scalarize, str):
            words["scalarize"] = "one per task, or a function"
        if isinstance(self.channel_axis, Sequence):  # a list would be compared as numbers
            words["channel_axis"] = tuple(self.channel_axis)
        if isinstance(self.batch_axis, Sequence):
            words["batch_axis"] = tuple(self.batch_axis)
        words["cross_sample='fix'"] = self.cross_sample == "fix"
        return words

    def saliency(self) -> str:
        """How the saliency is taken, for a person."""
        scalarize = repr(self.scalarize) if isinstance(self.scalarize, str) else "a callable or one per task"
        return f"{self.target} gradient, scalarize={scalarize}, pool={self.pool!r}"

    def relations_of(self, relations: str | RelationWeights, tasks: Sequence[str]) -> RelationWeights:
        """Return the relation weights that the user passed, or named by a rule, for the metric of these options."""
        if isinstance(relations, str):
            relations = RelationWeights(len(tasks), relations)
        if not isinstance(relations, RelationWeights):
            raise WrongTypeError(
                f"relations must be the name of a rule or a RelationWeights, found {type(relations).__name__}."
            )
        if relations.num_tasks != len(tasks):
            raise TaskError(
                f"relations has num_tasks={relations.num_tasks}, but there are {len(tasks)} tasks. Pass "
                f"RelationWeights({len(tasks)}, ...)."
            )
        relations.adapt_to_metric(bounded=self.metric in BOUNDED_METRICS)
        return relations


def check_weighting_level(surgery: Any) -> None:
    """Refuse, as ``surgery=``, what is a surgery itself and not a weighting."""
    if isinstance(surgery, GradientCombiner) or hasattr(surgery, "backward"):
        raise ConfigurationError(
            f"surgery= takes a weighting such as PCGrad(), found {type(surgery).__name__}. For surgery at the feature map "
            "pass surgery=PCGrad(); for surgery on the parameters leave surgery= out, and call "
            "parameter_surgery.backward(losses, regularizer()). Both at once would weigh the gradients twice."
        )


def heads_that_tell(heads: Heads, feature: object, output: object) -> Sequence[nn.Module] | None:
    """The heads, if they are all there is between the feature map and the outputs; ``None`` if that is not known."""
    return None if heads.goes_on or feature is not None or output is not None else heads.modules


def tasks_and_heads(
    model: nn.Module | None,
    heads: HeadsChoice,
    tasks: Sequence[str] | None,
    columns: ColumnsChoice,
    of_a_model: Mapping[str, Any],
) -> tuple[Sequence[str], Heads | None, Sequence[nn.Module] | None]:
    """The task names, and the heads in a model; ``of_a_model`` are other arguments that need one.

    And the modules that are all there is between the feature map and the outputs, if that is known.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise WrongTypeError(f"model must be a torch.nn.Module, found {type(model).__name__}.")
    if model is not None:
        found = resolve_heads(model, heads, tasks, columns)
        return found.tasks, found, heads_that_tell(found, of_a_model["feature"], of_a_model["output"])
    if without := [
        f"{name}=" for name, value in {"heads": heads, "columns": columns, **of_a_model}.items() if value is not None
    ]:
        raise ConfigurationError(f"{', '.join(without)} can only be used with a model. Pass it as first argument.")
    if tasks is None:
        raise MissingArgumentError("without a model the tasks need names. Pass tasks=['a', 'b', ...].")
    return check_task_names(tasks), None, None
