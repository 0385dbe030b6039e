"""Methods that change who shares what in the course of a training, by relations between the tasks found until then."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saliency_reg import SelectiveSharing

from ..runtime.errors import OptionError


class Reshaping(ABC):
    """What a method does to model and optimizer between epochs, and what it notes meanwhile."""

    #: Whether :meth:`observe` has to be called.
    observes = False

    def observe(self, labels: Tensor) -> None:
        """Take the labels ``[b, T]`` of the latest forward, before its backward pass; numbers are in standard units."""
        del labels

    @abstractmethod
    def after_epoch(self, epoch: int) -> bool:
        """Do what is due after so many epochs, and return whether the model has other parameters now."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]: ...

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Bring a new model and its new optimizer to where the state was taken; their own states are loaded after that."""

    @abstractmethod
    def remove(self) -> None:
        """Take everything off the model."""


class SharedEstimators(Reshaping):
    """Selective Sharing: after a quarter of the epochs, tasks with gradients that are alike share a layer of their heads.

    The estimator of a task is the first layer of its head. All begin with the weights of the first.

    Args:
        model: with ``heads``, each of two layers or more.
        epochs: of the whole training.

    Raises:
        OptionError: heads of a single layer.
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: Sequence[str],
        optimizer: torch.optim.Optimizer,
        process_group: Any = None,
        *,
        epochs: int,
    ) -> None:
        heads = model.get_submodule("heads")
        layers = [_layers(head) for head in heads.children()]
        if len(layers) != len(tasks) or min(map(len, layers)) < 2:
            raise OptionError(
                f"selective sharing needs a head of two layers for each of the {len(tasks)} tasks. Use a head_width above "
                "0, or another method."
            )
        self._epoch = first_phase(epochs)
        self._sharing = SelectiveSharing(
            model,
            estimators={task: own[0] for task, own in zip(tasks, layers)},
            optimizer=optimizer,
            process_group=process_group,
        )

    def after_epoch(self, epoch: int) -> bool:
        if epoch != self._epoch:
            return False
        groups = self._sharing.groups()
        self._sharing.share(groups)
        return len(groups) < len(self._sharing.tasks)

    def state_dict(self) -> dict[str, Any]:
        return {"sharing": dict(self._sharing.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sharing.load_state_dict(state["sharing"])

    def remove(self) -> None:
        self._sharing.remove()


def first_phase(epochs: int) -> int:
    """A quarter of the epochs, rounded up: how long relations are gathered.

    Raises:
        OptionError: a training of a single epoch.
    """
    if epochs < 2:
        raise OptionError(
            f"found epochs={epochs}: relations have to be found in one epoch, to be used in another. Use 2 or more."
        )
    return -(-epochs // 4)


def _layers(head: nn.Module) -> list[nn.Module]:
    """Modules that have a weight of two axes or more of their own, in their order."""
    return [own for own in head.modules() if any(weight.ndim > 1 for weight in own.parameters(recurse=False))]
