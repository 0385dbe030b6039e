"""From the Gramian of the task gradients to the weights of their sum. A new weighting goes beside :class:`PCGrad`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import Ranks
from ..errors import ShapeError, WrongTypeError
from ..tasks import spread
from ..torch_tools import SeededModule, derives_from, warn_user
from .zero_rows import takes_zero_rows

#: ``[T, T]`` inner products of the task gradients to ``[T]`` weights of their sum.
Weighting = Callable[[Tensor], Tensor]


class PCGrad(SeededModule):
    r"""Gradient surgery of Yu et al. (NeurIPS 2020), as a weighting.

    Each task gradient is projected onto the normal plane of those it conflicts with, one after the other in random order
    (their algorithm 1), and the results are added up. All of that happens in the span of the task gradients, so
    their Gramian is enough, and the result is a weighted sum of them. Without conflicts all weights are 1.

    The order is drawn anew in each call by a CPU generator that depends on the seed and the number of calls alone: it is the
    same on every process, is not touched by other draws, and resumes from the ``state_dict``. A zero gradient changes
    nothing.

    Args:
        seed: of the order.

    Shape: ``[T, T] -> [T]``, both in the dtype of the Gramian.

    Example:
        >>> PCGrad()(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]))
        tensor([1.5000, 1.5000])
    """

    #: Zero gradients need not be taken out before the call.
    ignores_zero_gradients = True

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)

    def order(self, num_tasks: int, call: int | None = None) -> Tensor:
        """The order of one call (by default the next), ``[T, T-1]``: row ``i`` has the others as task ``i`` meets them."""
        generator = self.generator_of(self._value("calls") if call is None else call)
        keys = torch.rand(num_tasks, num_tasks, generator=generator, dtype=torch.float64, device="cpu")
        return keys.fill_diagonal_(2).argsort(1)[:, :-1]  # itself comes last, and goes

    @torch.no_grad()
    def forward(self, gramian: Tensor) -> Tensor:
        """Return the weights."""
        order = self.order(len(gramian)).to(gramian.device)
        self._set_value("calls", self._value("calls") + 1)
        norms = gramian.diagonal()
        inverse = torch.where(norms == 0, torch.zeros_like(norms), norms.reciprocal())[order]  # [T, T-1]
        products = gramian.clone()  # row i: of what has become of g_i, with all gradients
        removed = torch.zeros_like(inverse)
        for place, others in enumerate(order.unbind(1)):
            product = products.gather(1, others.unsqueeze(1))
            share = product.clamp(max=0).mul_(inverse[:, place : place + 1])  # [T, 1]
            products.addcmul_(share, gramian.index_select(0, others), value=-1)
            removed[:, place : place + 1] = share
        return torch.ones_like(norms).scatter_add_(0, order.flatten(), -removed.flatten())


def check_weighting(weighting: Any, num_tasks: int | None) -> Weighting:
    """Return the weighting after a trial on a copy, so that one that cannot work fails before the first step.

    An aggregator of TorchJD stands for its weighting; if that one wants a Jacobian, it is given a square root of the
    Gramian, which has the same inner products. There is no trial while the number of tasks is not known (``None``).
    """
    if isinstance(weighting, type) or not callable(weighting):
        raise WrongTypeError(f"{_EXPECTED}; found {_name(weighting)}. {_ADVICE}")
    if isinstance(weighting, PCGrad):
        return weighting
    usable: Weighting = weighting
    if derives_from(weighting, "Aggregator"):
        if hasattr(weighting, "gramian_weighting"):
            usable = weighting.gramian_weighting
        elif derives_from(weighting, "WeightedAggregator"):
            usable = _OfSquareRoot(weighting.weighting)
        else:
            raise WrongTypeError(
                f"{_EXPECTED}; {_name(weighting)} is an aggregator that is no weighted sum of the gradients. {_ADVICE}"
            )
    if num_tasks is None:
        return usable
    trial = torch.eye(num_tasks, dtype=torch.float64) + 0.1  # not the identity, which may be a special case
    try:
        probe = copy.deepcopy(usable)
    except Exception:  # whatever its own copying raises
        return usable
    if callable(reset := getattr(probe, "reset", None)):
        reset()  # it may have been in use, for other tasks
    _weights_of(probe, trial)
    return usable


class _OfSquareRoot(nn.Module):
    """For weightings of a Jacobian ``[T, P]``: called with ``[T, T]`` rows that have the Gramian's inner products."""

    def __init__(self, weighting: nn.Module) -> None:
        super().__init__()
        self.weighting = weighting
        if callable(reset := getattr(weighting, "reset", None)):
            self.reset = reset

    def forward(self, gramian: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(gramian)
        weights: Tensor = self.weighting(vectors * values.clamp(min=0).sqrt())
        return weights


@torch.no_grad()
def task_weights(weighting: Weighting, gramian: Tensor, ranks: Ranks) -> Tensor:
    """Apply a weighting to the tasks whose gradient is not zero; the others get 1, which means nothing.

    A weighting that keeps state by position, which has a ``reset()``, sees all tasks, as :mod:`.zero_rows` says, or else
    begins anew where other tasks have a gradient than in its latest call. One that cannot leave tasks out (fixed weights)
    sees all of them.

    A Gramian that is not finite gives weights that are not, so that GradScaler finds them. Every process gets the same
    weights to the bit, given the same Gramian.
    """
    if getattr(weighting, "ignores_zero_gradients", False):
        return _weights_of(weighting, gramian)
    if not bool(torch.isfinite(gramian).all()):
        return torch.full_like(gramian.diagonal(), torch.nan)
    # On the host: most weightings solve a problem there anyway.
    present = gramian.diagonal().cpu().nonzero().flatten().tolist()
    # A single task has nothing to be weighed against, but for what a weighting knows of the absent ones.
    if not present or (len(present) == 1 and not takes_zero_rows(weighting, max(len(gramian), 3))):
        return torch.ones_like(gramian.diagonal())
    if len(present) == len(gramian):
        _keep_state_apart(weighting, present)
        weights = _weights_of(weighting, gramian)
    elif len(present) == 1 or takes_zero_rows(weighting, len(gramian)):
        weights = _weights_of(weighting, gramian)[present]
    else:
        _keep_state_apart(weighting, present)
        try:
            weights = _weights_of(weighting, gramian[present][:, present])
        except (ShapeError, ValueError, RuntimeError):  # whatever it raises for another number of tasks
            weights = _weights_of(weighting, gramian)[present]
    return ranks.from_first(spread(weights, present, len(gramian), 1.0).clone())


def _keep_state_apart(weighting: Any, present: list[int]) -> None:
    """Reset a weighting with state, which has a ``reset()``, if its state belongs to other tasks than those ``present``."""
    reset = getattr(weighting, "reset", None)
    if not callable(reset):
        return
    before = vars(weighting).get(_TASKS_OF_STATE, present)
    vars(weighting)[_TASKS_OF_STATE] = present
    if before != present:
        reset()
        if not vars(weighting).get(_TOLD):
            vars(weighting)[_TOLD] = True
            warn_user(
                f"{_name(weighting)} keeps state, and is begun anew whenever other tasks have a gradient than in the step "
                "before: what it keeps would go to other tasks, and all weight to zero gradients. Give each batch labels of "
                "all tasks, or use a weighting without state, such as PCGrad() or UPGradWeighting()."
            )


def begin_anew(weighting: Any) -> None:
    """Reset a weighting that keeps state by position, and say so: the positions are those of other tasks now."""
    reset = getattr(weighting, "reset", None)
    if callable(reset):
        reset()
        vars(weighting).pop(_TASKS_OF_STATE, None)
        warn_user(f"{_name(weighting)} keeps state of the tasks, and is begun anew for the tasks of now.")


def _weights_of(weighting: Weighting, gramian: Tensor) -> Tensor:
    weights: Any = weighting(gramian)
    if not isinstance(weights, Tensor):
        raise WrongTypeError(f"{_EXPECTED}; {_name(weighting)} returned {type(weights).__name__}.")
    if weights.shape != gramian.shape[:1]:
        raise ShapeError(
            f"{_EXPECTED}; for {len(gramian)} tasks {_name(weighting)} returned the shape {list(weights.shape)}."
        )
    return weights.detach().to(gramian)


def _name(weighting: Any) -> str:
    return f"the class {weighting.__name__}" if isinstance(weighting, type) else type(weighting).__name__


_TASKS_OF_STATE, _TOLD = "_saliency_reg_tasks_of_state", "_saliency_reg_told"
_EXPECTED = "a weighting maps a Gramian [T, T] to weights [T]"
_ADVICE = (
    "Pass PCGrad(), a Gramian weighting of torchjd.aggregation such as UPGradWeighting(), or a function of your own."
)
