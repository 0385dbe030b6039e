"""Heads of a multi-task model that come and go, one that is trained alone, and states of other tasks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from torch import nn

from ...errors import ConfigurationError, StateMismatchError, TaskError, WrongTypeError
from ...regularizer import SaliencyRegularizer
from ...torch_tools import check_choice, is_hooked

_Self = TypeVar("_Self", bound="ChangingHeads")


class ChangingHeads(nn.Module):
    """Base class of models with ``heads``, a ``ModuleDict`` in the order of the tasks, and a configuration for each."""

    heads: nn.ModuleDict
    head_configs: dict[str, Any]
    #: The task that is trained alone, and which parameters could be trained before.
    _alone: tuple[str, dict[str, bool]] | None = None

    def remove_task(self, name: str, *, regularizer: SaliencyRegularizer | None = None) -> None:
        """Take a head away; nothing else changes. If it was trained alone, the others can be trained again.

        Args:
            name: of the task.
            regularizer: the one that is attached to the heads: it lets the task go, too.

        Raises:
            TaskError: there is no such task, or no other.
            ConfigurationError: a regularizer or surgery is attached to the head, and was not passed.
            SaliencyRegError: those of the regularizer's ``remove_task``. The model is as it was.
        """
        if name not in self.head_configs:
            raise TaskError(f"there is no task {name!r} to remove: the tasks are {list(self.head_configs)}.")
        if len(self.head_configs) == 1:
            raise TaskError(f"{name!r} is the only task of this model. Add another one before.")
        if regularizer is not None:
            self._check_attached(regularizer)
            regularizer.remove_task(name)
        elif any(map(is_hooked, self.heads[name].modules())):
            raise ConfigurationError(
                f"a regularizer or surgery is attached to the head of {name!r}. Pass regularizer=, or call .remove() on it "
                f"or regularizer.remove_task({name!r}) before."
            )
        del self.heads[name]
        self._take_configs({task: config for task, config in self.head_configs.items() if task != name})
        if self._alone is not None and self._alone[0] == name:
            self.unfreeze_others()

    def freeze_others(self, task: str) -> None:
        """Train one head alone: no other parameter requires a gradient, and BatchNorms elsewhere stay in eval mode.

        So the outputs of the other tasks stay as they are. :meth:`unfreeze_others` is the way back. An optimizer may keep
        all parameters. Call it before the model is wrapped in ``DistributedDataParallel``.

        Raises:
            TaskError: there is no such task.
        """
        if task not in self.head_configs:
            raise TaskError(f"there is no task {task!r} to train alone: the tasks are {list(self.head_configs)}.")
        before = {name: parameter.requires_grad for name, parameter in self.named_parameters()}
        before.update({} if self._alone is None else self._alone[1])
        self._alone = task, before
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(f"heads.{task}.") and before[name])
        self.train(self.training)

    def unfreeze_others(self) -> None:
        """Let all be trained that could be before :meth:`freeze_others`.

        Raises:
            ConfigurationError: no task is trained alone.
        """
        if self._alone is None:
            raise ConfigurationError("no task is trained alone. Call freeze_others(task) before.")
        _, before = self._alone
        self._alone = None
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(before.get(name, parameter.requires_grad))
        self.train(self.training)

    def train(self: _Self, mode: bool = True) -> _Self:
        """Set the mode, but leave BatchNorms in eval mode where another head is trained alone."""
        super().train(mode)
        if mode and self._alone is not None:
            own = set(self.heads[self._alone[0]].modules())
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and module not in own:
                    module.eval()
        return self

    def load_state_dict(
        self,
        state_dict: Mapping[str, Any],
        strict: bool = True,
        assign: bool = False,
        *,
        tasks: Literal["all", "common"] = "all",
    ) -> Any:
        """Load a state dict, also one of before tasks came or went.

        Args:
            state_dict, strict, assign: as ever.
            tasks: ``"common"``: heads that the state does not have stay as they are, and heads that this model does not have
                are left out; all else must be there.

        Raises:
            StateMismatchError: it is of other tasks, or, of ``"common"`` ones, lacks something; nothing was loaded.
            ConfigurationError: another choice of ``tasks``.
        """
        check_choice("tasks", tasks, ("all", "common"))
        of_heads = {key: key.split(".")[1] for key in state_dict if key.startswith("heads.")}
        saved = list(dict.fromkeys(of_heads.values()))
        missing = [task for task in self.head_configs if task not in saved]
        unknown = [task for task in saved if task not in self.head_configs]
        if tasks == "all" or not (missing or unknown):
            if strict and (missing or unknown):
                raise StateMismatchError(
                    f"the state dict has heads of the tasks {saved}, and this model of {list(self.head_configs)}: it lacks "
                    f"{missing} and has {unknown} without a place. Nothing was loaded. For what both have pass "
                    "load_state_dict(state, tasks='common')."
                )
            return super().load_state_dict(state_dict, strict, assign)
        if len(missing) == len(self.head_configs):
            raise StateMismatchError(
                f"the state dict has heads of the tasks {saved}, of which this model has none: {list(self.head_configs)}. "
                "Nothing was loaded."
            )
        kept: Any = copy.copy(state_dict)  # with the versions of its modules, which it carries as an attribute
        for key in [key for key, task in of_heads.items() if task in unknown]:
            del kept[key]
        new = tuple(f"heads.{task}." for task in missing)
        expected = [key for key in self.state_dict() if not key.startswith(new)]
        lacks, more = [key for key in expected if key not in kept], sorted(kept.keys() - set(expected))
        if strict and (lacks or more):
            raise StateMismatchError(
                f"of what both models should have the state dict lacks {lacks[:6]}, and has {more[:6]} without a place. "
                "Nothing was loaded."
            )
        return super().load_state_dict(kept, False, assign)

    def _put_head(
        self,
        name: str,
        config: Any,
        head: nn.Module,
        *,
        freeze_others: bool,
        regularizer: SaliencyRegularizer | None,
    ) -> None:
        """Put a new head in, or leave everything as it was."""
        if regularizer is not None:
            self._check_attached(regularizer)
        like, before = next(self.heads.parameters()), self.head_configs
        self.heads[name] = head.to(device=like.device, dtype=like.dtype).train(self.training)
        self._take_configs({**before, name: config})
        try:
            if regularizer is not None:
                regularizer.add_task(name, f"heads.{name}")
        except BaseException:
            del self.heads[name]
            self._take_configs(before)
            raise
        if freeze_others:
            self.freeze_others(name)

    def _check_attached(self, regularizer: SaliencyRegularizer) -> None:
        if not isinstance(regularizer, SaliencyRegularizer):
            raise WrongTypeError(f"regularizer must be a SaliencyRegularizer, found {type(regularizer).__name__}.")
        if set(self.heads.modules()).isdisjoint(regularizer.heads):
            raise ConfigurationError(
                "the regularizer is attached to no head of this model: it is that of another one, or a copy. Pass the one "
                "that was built with this model, or leave regularizer= out."
            )

    def _check_new(self, name: object) -> None:
        if name in self.head_configs:
            raise TaskError(
                f"there is a task {name!r} already: the tasks are {list(self.head_configs)}. Choose another name, or call "
                f"remove_task({name!r}) before."
            )

    def _take_configs(self, configs: dict[str, Any]) -> None:
        self.head_configs = configs


def alike(pooling: str, shared: str, name: str, instead: str) -> None:
    """Refuse a head with a pooling of its own where all others share one; ``instead`` is what the others are told to be."""
    if pooling != shared:
        raise ConfigurationError(
            f"all heads of this model read what was pooled once, by {shared!r}, and {name!r} would have to pool by "
            f"{pooling!r}. {instead}"
        )
