"""Tasks that come and go while a regularizer is in use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ...capture import FeatureCapture, FeatureChoice, HeadAliases, Heads, heads_with, heads_without
from ...errors import CaptureError, ConfigurationError, SaliencyRegError, TaskError, WrongTypeError
from ...relations import ALL_PAIRS, taken
from ...saliency import Scalarize
from ...surgery import check_weighting
from ...surgery.feature import ForkedAliases
from ...tasks import check_task_names
from ...torch_tools import derives_from, names_to_bytes, warn_user
from ..options import Options, heads_that_tell
from ..penalty import Penalty, extractor_of
from ..reach import Reach

_REACHES_NOW = (
    "with the heads as they are now the penalty may reach the backbone, and strength='auto' goes on to hold it at "
    "share={share:g} of the task losses, as for heads alone. For the share of a penalty that reaches the backbone build a "
    "new regularizer, and load this one's state_dict() into it."
)


@dataclass
class _Change:
    """All that is different afterwards, checked and ready."""

    tasks: Sequence[str]
    order: Sequence[int | None]  # of each task its index so far, None for the new one
    options: Options
    capture: FeatureCapture | None  # already on the model, beside the one so far
    model: nn.Module | None
    told: Sequence[nn.Module] | None  # heads that are all there is between the feature map and the outputs


class ChangingTasks(Penalty):
    """What a regularizer has in order to take another task, or to let one go."""

    _capture: FeatureCapture | None
    #: Whether it was built without a model: a copy has no capture either.
    _without_model: bool = False

    def add_task(
        self,
        name: str,
        head: Any = None,
        *,
        columns: Any = None,
        scalarize: Scalarize | None = None,
        output: Any = None,
        model: nn.Module | None = None,
    ) -> None:
        """Take one more task, which comes last, after its head was put into the model. All else goes on as it was.

        The weights of the others keep their ratios (under ``"per_task"`` those of each task do), and the new pairs begin as
        :meth:`RelationWeights.carried` says: with the mean distance or weight of the others, until their own distances are
        seen. Steps, strength and pending distances stay. Call it between an optimizer step and the next forward: a forward
        that was not read is dropped, and under surgery its backward pass is refused. Let the optimizer train the new head:
        ``optimizer.add_param_group({"params": model.heads[name].parameters()})``.

        With ``DistributedDataParallel``, put the head into ``ddp.module``, wrap that again, and pass ``model=`` the new
        wrapper, on all processes: the old one does not average its gradients.

        Args:
            name: of the task.
            head: its name in the model, the module, or a list of modules; by default it is looked for where the other heads
                are (``"heads.new"`` beside ``"heads.old"``). For one head with the outputs of all tasks: the one in its
                place, by default what has its name now; the new column comes last.
            columns: where each task has several columns of that head: those of the new task, or ``{task: columns}`` of all.
            scalarize: of its output, where it is another choice than for the others.
            output: the part of what its head returns, where they are given for each task.
            model: to be attached to from now on, such as a new wrapper; by default as before.

        Raises:
            TaskError: there is a task of this name, or the columns do not fit the tasks.
            HeadNotFoundError: there is no head for it in the model, or one of the others is no longer there.
            CaptureError: this is a copy, which is attached to no model, or it was removed.
            ConfigurationError: the model is in the ``DistributedDataParallel`` of before, the surgery is made for another
                number of tasks, or the processes do not do the same.
            SaliencyRegError: others of its kinds; everything is as it was.

        Example:
            >>> from saliency_reg import SaliencyRegularizer
            >>> model = nn.ModuleDict({"heads": nn.ModuleDict({"a": nn.Linear(4, 1), "b": nn.Linear(4, 1)})})
            >>> regularizer = SaliencyRegularizer(model, heads="heads", strength=0.1)
            >>> model["heads"]["c"] = nn.Linear(4, 1)
            >>> regularizer.add_task("c")
            >>> regularizer.relations.matrix().round(decimals=2)
            tensor([[0.0000, 0.3300, 0.3300],
                    [0.3300, 0.0000, 0.3300],
                    [0.3300, 0.3300, 0.0000]], dtype=torch.float64)
            >>> regularizer.remove_task("c")
            >>> regularizer.tasks
            ('a', 'b')
        """

        def planned() -> _Change:
            if not isinstance(name, str):
                raise WrongTypeError(f"a task name must be a str, found {type(name).__name__}.")
            if name in self.tasks:
                raise TaskError(
                    f"there is a task {name!r} already: the tasks are {list(self.tasks)}. Choose another name, or call "
                    f"remove_task({name!r}) before."
                )
            options = self._options
            if scalarize is not None and scalarize != options.scalarize:
                options = replace(options, scalarize={**self._choices(), name: scalarize})
            elif isinstance(options.scalarize, Sequence) and not isinstance(options.scalarize, str):
                options = replace(options, scalarize=self._choices())
            order = [*range(len(self.tasks)), None]
            return self._planned(
                order,
                [*self.tasks, name],
                options,
                model,
                lambda heads, now: heads_with(heads, now, name, head, columns),
                {} if output is None else {name: output},
            )

        self._change(f"add_task({name!r})", planned)

    def remove_task(self, name: str, *, head: Any = None, columns: Any = None, model: nn.Module | None = None) -> None:
        """Let a task go, before or after its head was taken out of the model. All else goes on as it was.

        The others keep their distances and the ratios of their weights, as :meth:`RelationWeights.carried` says. The
        parameters of the head may stay in an optimizer: without a gradient it leaves them alone. See :meth:`add_task` for
        when to call it, for ``DistributedDataParallel``, and for errors.

        Args:
            name: of the task.
            head: for one head with the outputs of all tasks: the one that has taken its place, with the columns of the
                others in their order; by default what has its name now.
            columns: ``{task: columns}`` of the others in it, where it is another one and tasks have several columns.
            model: to be attached to from now on; by default as before.

        Raises:
            TaskError: there is no such task, or fewer than two would be left.
            SaliencyRegError: as :meth:`add_task`; everything is as it was.
        """

        def planned() -> _Change:
            if name not in self.tasks:
                raise TaskError(f"there is no task {name!r} to remove: the tasks are {list(self.tasks)}.")
            if len(self.tasks) == 2:
                raise TaskError(
                    f"without {name!r} one task would be left of {list(self.tasks)}, and relations need at least 2. Call "
                    ".remove() to train it alone."
                )
            order = [index for index, task in enumerate(self.tasks) if task != name]
            options = self._options
            if not isinstance(options.scalarize, str) and isinstance(options.scalarize, (Mapping, Sequence)):
                choices = self._choices()
                options = replace(options, scalarize={task: one for task, one in choices.items() if task != name})
            return self._planned(
                order,
                [self.tasks[index] for index in order],
                options,
                model,
                lambda heads, now: heads_without(heads, now, name, head, columns),
                {},
            )

        self._change(f"remove_task({name!r})", planned)

    # How it is done.

    def _choices(self) -> dict[str, Scalarize]:
        return dict(zip(self.tasks, self._extractor.choices))

    def _planned(
        self,
        order: Sequence[int | None],
        tasks: Sequence[str],
        options: Options,
        model: nn.Module | None,
        heads_now: Callable[[Heads, nn.Module], Heads],
        outputs: Mapping[str, Any],
    ) -> _Change:
        check_task_names(tasks)
        if self.surgery is not None:
            try:
                check_weighting(self.surgery.weighting, len(tasks))
            except Exception as error:  # whatever a weighting raises
                raise ConfigurationError(
                    f"{type(self.surgery.weighting).__name__} cannot weigh {len(tasks)} tasks ({error}). Build a new "
                    "regularizer with a weighting for as many, and load_state_dict(state, tasks='common')."
                ) from error
        extractor_of(tasks, options)  # checks what is given for each task
        capture, told = None, None
        if not self._without_model:
            before, model = self._attached(model)
            heads = heads_now(before.heads, model)
            feature, output = before.chosen
            output = _outputs_of(output, tasks, outputs)
            capture = self._captured_in(model, heads, feature, output, instead_of=(before, self._reminders))
            told = heads_that_tell(heads, *capture.chosen)
        elif model is not None:
            raise ConfigurationError("model= is for a regularizer that was built with one. Leave it out.")
        return _Change(tasks, order, options, capture, model, told)

    def _attached(self, model: nn.Module | None) -> tuple[FeatureCapture, nn.Module]:
        """Return the capture so far, and the model to be attached to."""
        before = self._capture
        was = None if before is None else before.model
        if before is None or was is None:
            raise CaptureError(
                "this regularizer is attached to no model: it is a copy, it was removed, or the model is gone. Tasks come "
                "and go on the one that is attached; in place of this one build a new SaliencyRegularizer on the model as "
                "it is now, and load_state_dict(state, tasks='common')."
            )
        if model is not None and not isinstance(model, nn.Module):
            raise WrongTypeError(f"model must be a torch.nn.Module, found {type(model).__name__}.")
        wrappers = [module for module in was.modules() if derives_from(module, "DistributedDataParallel")]
        inside = set(map(id, (was if model is None else model).modules()))
        if any(id(wrapper) in inside for wrapper in wrappers):
            raise ConfigurationError(
                "the model is in a DistributedDataParallel that was made for the tasks so far: it would not average the "
                "gradients of a new head, and wait for those of one that is gone. Put heads into ddp.module or take them "
                "out, wrap ddp.module again, and pass model= the new wrapper, on all processes."
            )
        return before, was if model is None else model

    def _captured_in(
        self, model: nn.Module, heads: Heads, feature: FeatureChoice, output: Any, instead_of: Sequence[object] = ()
    ) -> FeatureCapture:
        aliases: HeadAliases | None = None
        if self.surgery is not None:
            named, axis = feature is not None, self._options.channel_axis
            aliases = ForkedAliases(self.surgery, heads, output, named=named, channel_axis=axis)
        run_all = self._options.run_all_heads
        return FeatureCapture(model, heads, feature, output, aliases, run_all=run_all, instead_of=instead_of)

    def _change(self, words: str, planned: Callable[[], _Change]) -> None:
        """Plan a change, and make it if all processes do the same; otherwise everything is as it was."""
        change, error = None, None
        try:
            change = planned()
        except SaliencyRegError as found:
            error, words = found, f"{words}, which fails: {found}"
        try:
            self._agree(words)
        except BaseException:
            if change is not None and change.capture is not None:
                change.capture.remove()
            raise
        if error is not None:
            raise error
        assert change is not None
        self._make(change)

    def _agree(self, words: str) -> None:
        joined, most = self._joined_batch, self.sampler.most
        if joined.ranks.size == 1:
            return
        tasks = len(self.tasks)
        among = range(tasks if tasks <= ALL_PAIRS or most is None else min(tasks, most))
        self._changing = words
        try:
            joined.compare(among, self.relations.among(among), self._settings)
        finally:
            self._changing = None

    @torch.no_grad()
    def _make(self, change: _Change) -> None:
        order = change.order
        self.tasks, self._options = tuple(change.tasks), change.options
        self.relations.change_tasks(order)
        self.pending.change_tasks(order)
        device = self.task_names.device
        self.register_buffer("task_names", names_to_bytes(self.tasks).to(device))
        self._checked_names = self.task_names
        if "saliency_seen" in self._buffers:
            self.register_buffer("saliency_seen", taken(self.saliency_seen, order))
        before, self._extractor = self._extractor, extractor_of(self.tasks, self._options)
        self._extractor.take_from(before, order)
        if self.surgery is not None:
            self.surgery.change_tasks(self.tasks)
        self._mixing.heads_changed()
        self._reminders.change_tasks(self.tasks, order)
        self._joined_batch.begin_anew()
        self._report = self._seen = None
        if change.capture is not None:
            old, self._capture = self._capture, change.capture
            assert old is not None
            assert change.model is not None
            old.sharded.release()
            old.remove()
            self._joined_batch.ranks.follow(change.model)
            self._reminders.remove()
            self._reminders.attach(change.model, change.capture.heads.names, change.capture.heads.ends)
            self._capture.enabled = old.enabled
            self._look_at_reach(change.told)
        self._strength_changes()

    def _look_at_reach(self, told: Sequence[nn.Module] | None) -> None:
        was, options = self._reach, self._options
        self._reach = Reach(told, options.target, options.scalarize, options.custom_backward)
        self._reach.go_on_from(was, self.tasks)
        if was.reaches is False and self._reach.reaches is not False and self.automatic_strength is not None:
            warn_user(_REACHES_NOW.format(share=options.share))


def _outputs_of(chosen: Any, tasks: Sequence[str], more: Mapping[str, Any]) -> Any:
    """Return ``output=`` for these tasks, from that of those before."""
    if not isinstance(chosen, Mapping):
        if more and chosen != next(iter(more.values())):
            raise ConfigurationError(
                f"output= is {chosen!r} for all heads. Leave it out, or build the regularizer with output={{task: part}}."
            )
        return chosen
    return {task: part for task, part in {**chosen, **more}.items() if task in tasks}
