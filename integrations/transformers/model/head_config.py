"""The description of a task head."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Union

from ....errors import ConfigurationError, WrongTypeError
from ....saliency import check_scalarize
from ...shared.head_options import check_number, configs_per_task, set_checked

_LEVELS = ("sequence", "token")
_POOLINGS = ("auto", "mean", "first", "last", "pooler")
_PROBLEMS = ("auto", "binary", "multi_label", "single_label", "regression")


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """A head: hidden layers and a ``Linear`` with one output per label, on each sequence or on each token.

    Args:
        num_labels: K, the number of outputs.
        problem: what the labels are. ``"binary"``: 0 or 1, for one output. ``"single_label"``: a class from 0 to K-1.
            ``"multi_label"``: K times 0 or 1. ``"regression"``: K numbers. ``"auto"``: ``"binary"`` for one output and
            ``"single_label"`` for more. (A classifier of transformers takes ``num_labels=1`` for a regression; here that is
            said.)
        level: ``"sequence"``: one prediction per text, image or recording. ``"token"``: one for each token or position.
        hidden: widths of the hidden layers; none for a linear head.
        activation: behind each hidden layer, ``"gelu"``, ``"relu"``, ``"tanh"`` or ``"silu"``. With ``"relu"``, as without
            hidden layers, the penalty trains the heads only.
        dropout: rate, behind each hidden layer, or in front of the only ``Linear``; ``None`` for that of the encoder's
            configuration.
        pooling: of a sequence head: ``"mean"`` over the real tokens (padding does not enter), the ``"first"`` token
            (``[CLS]``), the ``"last"`` real one, the encoder's own ``"pooler"`` output, or ``"auto"``: the mean, and the
            last one for decoder-only models.
        weight: of the task's loss in the sum of all.
        labels: names of the K labels, or none.

    Raises:
        ConfigurationError, WrongTypeError: a value that makes no head.

    Example:
        >>> from saliency_reg.integrations.transformers import HeadConfig
        >>> HeadConfig(5, level="token").problem
        'single_label'
    """

    num_labels: int = 1
    problem: str = "auto"
    level: str = "sequence"
    hidden: tuple[int, ...] = ()
    activation: str = "gelu"
    dropout: float | None = None
    pooling: str = "auto"
    weight: float = 1.0
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        set_checked(self, "num_labels", problem=_PROBLEMS, level=_LEVELS, pooling=_POOLINGS)
        problem = self.problem
        if problem == "auto":
            problem = "binary" if self.num_labels == 1 else "single_label"
        if problem == "binary" and self.num_labels != 1:
            raise ConfigurationError(
                f"a binary head has one output, found num_labels={self.num_labels}. Pass problem='multi_label' for "
                "several yes-or-no labels, or 'single_label' for classes."
            )
        if problem == "single_label" and self.num_labels == 1:
            raise ConfigurationError(
                "a head for classes needs num_labels=2 or more, found 1. Pass problem='binary' or 'regression'."
            )
        if self.level == "token" and self.pooling != "auto":
            raise ConfigurationError(
                f"a token head does not pool, found pooling={self.pooling!r}. Leave it out, or pass level='sequence'."
            )
        if isinstance(self.labels, str) or not isinstance(self.labels, Sequence):
            raise WrongTypeError(f"labels must be a tuple of names, found {self.labels!r}. Pass labels=('no', 'yes').")
        if self.labels and len(self.labels) != self.num_labels:
            raise ConfigurationError(
                f"found {len(self.labels)} names of labels for num_labels={self.num_labels}. Name each label once."
            )
        check_number("the weight of a loss", self.weight)
        plain = {"problem": problem, "weight": float(self.weight), "labels": tuple(map(str, self.labels))}
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return {**dataclasses.asdict(self), "hidden": list(self.hidden), "labels": list(self.labels)}


#: What the public ``heads=`` accepts: ``{task: num_labels}``, ``{task: HeadConfig}``, or task names.
HeadsDescription = Union[Mapping[str, Union[int, HeadConfig]], Sequence[str]]


def head_configs(heads: HeadsDescription, head: HeadConfig | None) -> dict[str, HeadConfig]:
    """Return one configuration for each task; ``head`` has what a number of labels, or a name alone, leaves open."""
    found = configs_per_task(heads, head, HeadConfig, "labels", _with_labels)
    with_pooler = [task for task, config in found.items() if config.pooling == "pooler"]
    if with_pooler and len(with_pooler) < len(found):
        raise ConfigurationError(
            f"the heads {with_pooler} read the encoder's pooler output, the others its hidden states: they share no feature "
            "map. Pass pooling='pooler' for all heads, or for none."
        )
    return found


def scalarize_of(choice: Any, configs: Mapping[str, HeadConfig]) -> Any:
    """Return ``scalarize=`` for each task: outputs that are no classes are added up.

    ``[B, L]`` of a token head is one value at each position, and not L classes.
    """
    if isinstance(choice, Mapping):
        default = scalarize_of("auto", configs)
        return {**default, **choice} if isinstance(default, Mapping) else choice
    if not isinstance(choice, str):
        return choice
    check_scalarize(choice)
    added = {task for task, config in configs.items() if config.level == "token" and config.num_labels == 1}
    if choice == "auto":
        added |= {task for task, config in configs.items() if config.problem in ("multi_label", "regression")}
    return {task: "sum" if task in added else choice for task in configs} if added else choice


def _with_labels(head: HeadConfig, number: int) -> HeadConfig:
    # The problem was filled in for the head's own number of labels.
    fits = number == 1 if head.problem == "binary" else number > 1 if head.problem == "single_label" else True
    return dataclasses.replace(head, num_labels=number, labels=(), problem=head.problem if fits else "auto")
