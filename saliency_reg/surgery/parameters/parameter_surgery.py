"""Gradient surgery on the parameters that the tasks share: exact, with one backward pass for each task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...distributed import Ranks
from ...errors import ConfigurationError, StateMismatchError, SurgeryError, TaskError, WrongTypeError
from ...report import SurgeryReport
from ...tasks import Losses, check_task_names, first_few
from ...torch_tools import (
    Removable,
    StateModule,
    StepGuard,
    check_not_closure_only,
    names_from_bytes,
    names_to_bytes,
    real_device,
    unwrap_optimizer,
    whole_number,
)
from .. import PCGrad, Weighting, check_weighting, task_weights
from .agreement import agree, agree_on_names
from .losses import LossBatch, checked_losses
from .shared_parameters import ParameterChoice, check_connected, members, names_of_parameters, refuse_sharded
from .task_gradients import Gradients, StepGradients, averaged, gramian_at, gramian_in_chunks, write


class ParameterSurgery(StateModule, Removable):
    r"""Gradient surgery between the tasks on the parameters that they share (Yu et al., NeurIPS 2020, algorithm 1).

    ``surgery.backward(losses, penalty)`` takes the place of ``loss.backward()``. With ``g_t`` the gradient of loss ``t`` on
    the shared parameters, their inner products become weights ``w_t``, and ``sum_t w_t g_t`` is added to ``.grad`` there.
    All other parameters, such as those of heads, get the plain gradient of the sum of the losses. The penalty's gradient is
    added everywhere and never projected. A parameter that nothing reaches keeps its ``.grad``, ``None`` too.

    This is the exact method, and costs a backward pass through the backbone for each task; :class:`FeatureSurgery`, or
    ``surgery=`` of :class:`SaliencyRegularizer`, is its upper-bound form at the price of a plain step. ``docs/surgery.md``
    compares the two. Given the same order, the result is that of the paper's algorithm. Implementations that flatten all
    parameters of a model let the heads' gradients into the norms; here norms are those on the shared parameters.

    Gradients are taken by ``torch.autograd.grad``: hooks on tensors see the gradient of each task, but neither
    ``post_accumulate_grad`` hooks nor those of DistributedDataParallel fire. In distributed runs (with a wrapped model or a
    plain one) gradients are averaged over the processes here, before the projection: the result is that of one process on
    the joined batch, whose loss is the mean of the processes' losses. A task may be missing from those of some processes,
    or of all.

    Under GradScaler pass scaled losses and a scaled penalty: a NaN or infinite loss reaches ``.grad``, so that the step is
    skipped. The graph of the backbone is freed; those of the heads live as long as the losses do.

    Args:
        model: the model, or a wrapper around it; for learned loss weights in distributed runs
            ``nn.ModuleList([model, weights])``.
        weighting: Gramian ``[T, T]`` to weights ``[T]``: :class:`PCGrad` (the default), a Gramian weighting of TorchJD, or
            any callable.
        tasks: T names. By default those of the first call, which then has to have all tasks (on some process).
        shared: the shared parameters: a module, a name, or a list of modules, names and parameters. By default all
            parameters of the model on which at least two losses of the step depend. Outputs that were joined in one
            tensor before the losses (``torch.cat``) let each loss depend on all heads: then say what is shared.
        measure: the same, for the part of the shared parameters on which inner products are taken. There are then T passes
            down to that part only, and one through everything.
        every: measure in every so many optimizer steps, and keep the weights in between, where the backbone is passed once.
            A task without a gradient in the measured step has weight 1.
        chunk_size: hold at most this many task gradients, plus one, at a time: for T tasks, about ``T^2 / (2 chunk_size)``
            passes instead of T. Otherwise there are T, of the measured parameters.
        optimizer: one whose ``step`` is to be refused without a ``backward`` of this object before, see
            :meth:`attach_optimizer`.
        process_group: the data-parallel processes: a group of torch.distributed, or ``"local"`` for this process alone. By
            default a new group, over the processes of a ``DistributedDataParallel`` around the model, or over all.

    Raises:
        SaliencyRegError: one of its kinds, for arguments that cannot work.

    Example:
        >>> model = nn.ModuleDict({"backbone": nn.Linear(8, 4), "smiling": nn.Linear(4, 1), "young": nn.Linear(4, 1)})
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> surgery = ParameterSurgery(model, PCGrad(), optimizer=optimizer)
        >>> feature = model["backbone"](torch.randn(16, 8))
        >>> losses = {task: model[task](feature).square().mean() for task in ("smiling", "young")}
        >>> surgery.backward(losses)
        >>> optimizer.step()
        >>> surgery.report.weights.shape
        torch.Size([2])
    """

    steps: Tensor
    any_values: ClassVar[tuple[str, ...]] = ("weights",)
    weights: Tensor
    task_names: Tensor

    # A copy is not attached: model and optimizer belong to the original.
    in_a_copy: ClassVar[dict[str, Any]] = {
        "_model": None,
        "_guard": None,
        "_report": None,
        "_unfinished": None,
        "_ready": False,
    }

    def __init__(
        self,
        model: nn.Module,
        weighting: Any = None,
        *,
        tasks: Sequence[str] | None = None,
        shared: ParameterChoice | None = None,
        measure: ParameterChoice | None = None,
        every: int = 1,
        chunk_size: int | None = None,
        optimizer: Any = None,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise WrongTypeError(f"model must be a torch.nn.Module, found {type(model).__name__}.")
        refuse_sharded(list(model.parameters()), list(model.modules()))
        self.every = whole_number("every", every, least=1)
        self.chunk_size = None if chunk_size is None else whole_number("chunk_size", chunk_size, least=1)
        names = None if tasks is None else check_task_names(tasks)
        self.weighting = PCGrad() if weighting is None else weighting
        # Not registered: it may be a part of the weighting.
        self._usable: tuple[Weighting] = (check_weighting(self.weighting, None if names is None else len(names)),)
        self._shared = None if shared is None else names_of_parameters(model, shared, "shared")
        self._measured = None if measure is None else names_of_parameters(model, measure, "measure")
        if self._shared is not None and self._measured is not None and (more := sorted(self._measured - self._shared)):
            raise ConfigurationError(
                f"measure has parameters that shared does not have: {first_few(more)}. Inner products are taken on shared "
                "parameters only: pass a part of shared=."
            )
        self._set_tasks(names or ())
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=real_device()))
        self._has_weights = False
        self.ranks = Ranks(process_group, model)
        self._agreed = False
        self._report: SurgeryReport | None = None
        #: Of the micro-batches so far.
        self._unfinished: StepGradients | None = None
        self._ready = False
        # Not registered: the model is not a part of this object. A tuple hides it.
        self._model: tuple[nn.Module] | None = (model,)
        self._guard: StepGuard | None = None
        if optimizer is not None:
            self.attach_optimizer(optimizer)

    # What a training loop calls.

    @torch.no_grad()
    def backward(self, losses: Losses, penalty: Tensor | float | None = None, *, accumulate: bool = False) -> None:
        """Add the combined gradients to ``.grad``. In distributed runs every process has to call it.

        An error leaves every ``.grad`` as it was.

        Args:
            losses: ``{task: 0-dim loss}``, which may leave tasks out, or a sequence of T losses. With your loss weights and
                the loss scale, the same for all, in them. Their graph is freed.
            penalty: 0-dim, what is to be added without projection: ``regularizer()``, weight decay.
            accumulate: more micro-batches follow. All T gradients of the shared parameters are kept and added up, with
                ``measure=``, too (``chunk_size=`` is refused), and the first call without it projects and writes. With
                losses divided by the number of micro-batches this equals the joined batch. An exception out of autograd
                itself drops the micro-batches before; an error of this package keeps them.

        Raises:
            TaskError, WrongTypeError, ShapeError: losses that are too few, unknown, no tensors, or not 0-dim.
            NotConnectedError: a loss without a graph, or that does not depend on what the tasks share.
            ConfigurationError: a model, a graph or an option that cannot work here.
            SurgeryError: this is a copy, or the losses of another process were refused.
        """
        if self._model is None:
            raise SurgeryError(
                "this is a copy, which belongs to no model. Build ParameterSurgery with the copied model."
            )
        (model,) = self._model
        names: dict[Tensor, str] = {leaf: name for name, leaf in model.named_parameters()}
        tasks = self._agreed_tasks(losses)

        def look() -> LossBatch:
            refuse_sharded((), list(model.modules()))
            if accumulate and self.chunk_size is not None:
                raise ConfigurationError(
                    "chunk_size= holds a few task gradients at a time, but accumulation has to keep all of them until the "
                    "last micro-batch. Leave chunk_size= out, or call backward once for each optimizer step."
                )
            return checked_losses(losses, penalty, tasks, names, self.ranks.size > 1)

        found = agree(look, list(names), len(tasks), self.ranks)
        candidates = [leaf for leaf, name in names.items() if self._shared is None or name in self._shared]
        step = self._unfinished or StepGradients(set(candidates), [{} for _ in tasks])
        reach = {leaf: step.reach.get(leaf, 0) | found.reach.get(leaf, 0) for leaf in names}
        present = step.present | found.present
        named = self._shared is not None
        shared = [leaf for leaf in candidates if reach[leaf].bit_count() > 1 or (named and reach[leaf])]
        measured = [leaf for leaf in shared if self._measured is None or names[leaf] in self._measured]
        if not accumulate and present.bit_count() > 1:
            with_loss = {task: tasks[task] for task in members(present)}
            check_connected(with_loss, [reach[leaf] for leaf in shared], [reach[leaf] for leaf in measured], named)
        # All has been checked: nothing was changed before this line.
        if self.tasks is None:
            self._set_tasks(tasks)
        self._agreed = True
        self._unfinished = None  # if autograd raises now, the micro-batches are of no use
        step.calls += 1
        step.reach, step.present = reach, present
        step.reach_of_penalty |= found.reach_of_penalty
        gradients = self._pass_back(step, found.batch, shared, measured, accumulate)
        if gradients is None:
            self._unfinished = step
            return
        write(gradients)
        self._set_value("steps", self._value("steps") + 1)
        self._ready = True

    def discard(self) -> None:
        """Forget the micro-batches of an accumulation that is not to be finished."""
        self._unfinished = None

    def attach_optimizer(self, optimizer: Any) -> None:
        """Refuse ``optimizer.step()`` without a ``backward`` since the last step, or within an accumulation.

        Wrappers that carry the optimizer as ``.optimizer`` are unwrapped. A step with a closure is not checked.

        Raises:
            WrongTypeError: no optimizer.
            ConfigurationError: an optimizer that evaluates a closure several times per step (LBFGS).
        """
        inner = unwrap_optimizer(optimizer)
        check_not_closure_only(inner)
        if self._guard is not None:
            self._guard.remove()
        self._guard = StepGuard(inner, self._before_step, self._after_step)

    def remove(self) -> None:
        """Take the check off the optimizer, and forget an unfinished accumulation. The report stays readable."""
        self.discard()
        if self._guard is not None:
            self._guard.remove()
            self._guard = None

    @property
    def report(self) -> SurgeryReport | None:
        """Figures of the latest step in which gradients were measured; ``None`` before it."""
        return self._report

    # How it is done.

    def _pass_back(
        self, step: StepGradients, batch: LossBatch, shared: list[Tensor], measured: list[Tensor], accumulate: bool
    ) -> Gradients | None:
        """Take the gradients of one call; with the last call of a step, return those to write to ``.grad``."""
        due = self._value("steps") % self.every == 0 or not self._has_weights
        many_calls = accumulate or step.calls > 1
        present = members(step.present)
        weights = self.weights
        combined: Gradients = {}
        if due and (many_calls or (self.chunk_size is None and len(measured) == len(shared))):
            step.add_each_task(batch)
            if not accumulate:
                for task in present:
                    step.by_task[task].update(averaged(shared, step.by_task[task], self.ranks))
                weights = self._weigh(present, lambda: gramian_at(measured, step.by_task))
                combined = step.combine(shared, weights)
        else:
            if due:
                chunk = self.chunk_size or len(present)
                weights = self._weigh(
                    present, lambda: gramian_in_chunks(batch, present, len(weights), chunk, measured, self.ranks)
                )
            step.add_weighted(batch, set(shared), weights)
        return None if accumulate else step.finish(combined, set(shared), weights, self.ranks)

    def _weigh(self, present: list[int], gramian_of_tasks: Callable[[], Tensor]) -> Tensor:
        if len(present) < 2:  # nothing to weigh against; the next step will show more
            self.weights.fill_(torch.nan)
            self._has_weights = False
            return torch.ones_like(self.weights)
        gramian = gramian_of_tasks()
        weights = task_weights(self._usable[0], gramian, self.ranks)
        self._report = SurgeryReport.of(tuple(self.tasks or ()), gramian, weights)
        self.weights = weights.clone()
        # Those of a step that overflowed are of no use to the next ones.
        self._has_weights = self.every > 1 and bool(torch.isfinite(weights).all())
        return weights

    def _agreed_tasks(self, losses: Any) -> tuple[str, ...]:
        known = self.tasks
        if self._agreed and known is not None:
            return known
        names = agree_on_names(known, losses, self.ranks)
        if len(names) < 2:
            raise TaskError(
                f"found {len(names)} loss(es) {names}, expected at least two: surgery weighs the gradients of tasks against "
                "each other. Call backward({'a': loss_a, 'b': loss_b}), and name all in tasks=[...] if some can be missing "
                "from the first batch."
            )
        if known is None:  # otherwise it was tried when this was built
            self._usable = (check_weighting(self.weighting, len(names)),)
        return tuple(check_task_names(names))

    def _set_tasks(self, tasks: Sequence[str]) -> None:
        self.tasks: tuple[str, ...] | None = tuple(tasks) or None
        self.register_buffer("task_names", names_to_bytes(tasks))
        self.register_buffer("weights", torch.full((len(tasks),), torch.nan, dtype=torch.float64, device=real_device()))

    def _before_step(self) -> None:
        if self._unfinished is not None:
            raise SurgeryError(
                "optimizer.step() in the middle of an accumulation: the last micro-batch is missing. Call "
                "surgery.backward(losses) without accumulate=True for it, or surgery.discard()."
            )
        if not self._ready:
            raise SurgeryError(
                "optimizer.step() without surgery.backward(losses) since the last step. Call it in place of "
                "loss.backward(), or surgery.remove() to go on without surgery."
            )

    def _after_step(self) -> None:
        self._ready = False

    def check_loaded(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Also refuse the state of other tasks; before the first call, the tasks are those of the state."""
        saved, weights = (state_dict.get(prefix + name) for name in ("task_names", "weights"))
        for name, value in {"task_names": saved, "weights": weights}.items():
            if value is not None and not (isinstance(value, Tensor) and value.ndim == 1):
                raise StateMismatchError(
                    f"{prefix + name!r} in the state dict must be a tensor with one axis. Save it again."
                )
        names = [] if saved is None else names_from_bytes(saved)
        if names and self.tasks is not None and tuple(names) != self.tasks:
            raise StateMismatchError(
                f"the state dict was saved for the tasks {names}, but this surgery has {list(self.tasks)}. Build it with "
                "the same tasks in the same order."
            )
        if saved is not None and weights is not None and len(weights) != len(names):
            raise StateMismatchError(f"the state dict has {len(weights)} weights for the tasks {names}. Save it again.")
        rest = {key: value for key, value in state_dict.items() if value is not saved and value is not weights}
        super().check_loaded(rest, prefix)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self.check_loaded(state_dict, prefix)
        saved, known = state_dict.get(prefix + "task_names"), self.tasks
        if saved is not None:
            self._set_tasks(names_from_bytes(saved))
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args, **kwargs)  # type: ignore[no-untyped-call]
        if self.tasks is None and known is not None:  # it was saved before its first call
            self._set_tasks(known)
        self._has_weights = len(self.weights) > 0 and bool(torch.isfinite(self.weights).all())
        self.discard()
