"""Methods that weigh the losses: uncertainty weighting, and any scalarizer of TorchJD by its name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..data.task_kinds import TaskKind
from ..runtime.errors import OptionError, need
from .kept_state import kept_in, restore


class LossWeights(nn.Module):
    """A scalarizer of TorchJD for tasks of which some can be absent.

    Its parameters, if there are any, belong into the optimizer, with a weight decay of 0. What is absent has no part: the
    scalarizer is called with the losses and the parameters of the other tasks alone.

    Args:
        scalarizer: losses of any number of tasks to a 0-dim loss; its parameters and buffers have an entry per task.
        factors: ``[T]``, what losses are multiplied by first; by default 1.
    """

    factors: Tensor | None

    def __init__(self, scalarizer: nn.Module, factors: Tensor | None = None) -> None:
        super().__init__()
        self.scalarizer = scalarizer
        self.register_buffer("factors", factors, persistent=False)

    def forward(self, losses: Tensor, known: Tensor) -> Tensor:
        """Return the loss of a step, 0-dim.

        Args:
            losses: ``[T]``, of any value where they are not known.
            known: ``[T]``, bool: which tasks have labels in this step.
        """
        known = known.to(losses.device)
        values = (losses if self.factors is None else losses * self.factors.to(losses))[known]
        if not len(values):
            return values.sum()
        own = {**dict(self.scalarizer.named_parameters()), **dict(self.scalarizer.named_buffers())}
        total: Tensor = functional_call(self.scalarizer, {name: value[known] for name, value in own.items()}, (values,))
        return total

    def after_step(self, losses: Tensor) -> None:
        """Take the losses of the same batch after the optimizer step, where :attr:`LossWeighting.after` says so."""

    def after_epoch(self) -> None:
        """Note the end of an epoch, where :attr:`LossWeighting.after` says so."""

    def get_extra_state(self) -> dict[str, Any]:
        """What the scalarizer keeps beside parameters and buffers."""
        return {"kept": kept_in(self.scalarizer)}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken."""
        restore(self.scalarizer, state["kept"])


class FAMOWeights(LossWeights):
    """FAMO (Liu et al., NeurIPS 2023): weights that learn which loss has fallen least in a step, on the same batch.

    A task that is absent from a step counts, in the update of the weights, as one that fell by the mean of the others: then
    the derivative of its own weight is 0, and those of the others are what they would be without it.
    """

    _before: Tensor | None = None
    _known: Tensor | None = None

    def forward(self, losses: Tensor, known: Tensor) -> Tensor:
        """As in the base class; without gradients the plain sum, of which nothing is kept.

        Raises:
            OptionError: the losses after the step before were not given.
        """
        if not torch.is_grad_enabled():
            return losses[known.to(losses.device)].sum()
        if self._before is not None:
            raise OptionError(
                "FAMO learns from the losses of the same batch after each optimizer step, and was not given them. Compute "
                "them again without gradients, and call .after_step(losses)."
            )
        self._before, self._known = losses.detach().clone(), known.to(losses.device)
        return super().forward(losses, known)

    @torch.no_grad()
    def after_step(self, losses: Tensor) -> None:
        """Learn from the ``[T]`` losses of the same batch after the optimizer step; without a call before, nothing."""
        before, known, self._before = self._before, self._known, None
        if before is None or known is None or not bool(known.any()):
            return
        (logits,) = self.scalarizer.parameters()
        falls = before.log() - losses.detach().to(before).log()
        shares = logits.to(before)[known].softmax(0)
        mean = (shares * falls[known]).sum()
        ones = torch.ones_like(before)
        self.scalarizer(torch.where(known, before, ones))
        self.scalarizer.update(torch.where(known, losses.to(before), torch.exp(-mean) * ones))  # type: ignore[operator]

    def get_extra_state(self) -> dict[str, Any]:
        """The state of the optimizer that it has of its own, too."""
        scalarizer: Any = self.scalarizer
        own = scalarizer._optimizer
        return {**super().get_extra_state(), "optimizer": None if own is None else own.state_dict()}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        super().set_extra_state(state)
        scalarizer: Any = self.scalarizer
        self._before = scalarizer._optimizer = None
        if state["optimizer"] is not None:
            scalarizer._optimizer = torch.optim.Adam(scalarizer.parameters())
            scalarizer._optimizer.load_state_dict(state["optimizer"])


class DWAWeights(LossWeights):
    """Dynamic weight average (Liu, Johns, Davison, CVPR 2019): weights by how fast the mean losses of epochs fall.

    A task that is absent from a step holds its place with its mean loss of this epoch, without a gradient: its mean stays.
    """

    sums: Tensor
    counts: Tensor
    means: Tensor

    def __init__(self, scalarizer: nn.Module, num_tasks: int) -> None:
        super().__init__(scalarizer)
        self.register_buffer("sums", torch.zeros(num_tasks))
        self.register_buffer("counts", torch.zeros(num_tasks))
        self.register_buffer("means", torch.ones(num_tasks))

    def forward(self, losses: Tensor, known: Tensor) -> Tensor:
        """As in the base class; without gradients the plain sum, of which nothing is kept."""
        known = known.to(losses.device)
        if not torch.is_grad_enabled() or not bool(known.any()):
            return losses[known].sum()
        self._count(losses.detach(), known)
        total: Tensor = self.scalarizer(torch.where(known, losses, self.means.to(losses)))
        return total

    def after_epoch(self) -> None:
        """Compare the mean losses of this epoch with those of the one before, in the next epochs."""
        self.scalarizer.step()  # type: ignore[operator]
        self.sums.zero_()
        self.counts.zero_()

    @torch.no_grad()
    def _count(self, losses: Tensor, known: Tensor) -> None:
        known = known.to(self.sums.device)
        self.sums += torch.where(known, losses.to(self.sums), 0)
        self.counts += known
        self.means.copy_(torch.where(self.counts > 0, self.sums / self.counts, self.means))


@dataclass(frozen=True)
class LossWeighting:
    """A method that makes one loss of those of the tasks.

    Attributes:
        label: for people.
        build: from the kinds of the tasks to its module, called as ``(losses [T], known [T]) -> total``; a function that has
            a name, so that it reaches workers.
        splittable: whether totals of micro-batches, or of processes, add up to that of the step. Otherwise a step has to be
            one batch in one process.
        after: what it has to be told: ``"step"``: ``.after_step(losses [T])`` of the same batch after each optimizer step;
            ``"epoch"``: ``.after_epoch()``; ``""``: nothing.
    """

    label: str
    build: Callable[[Mapping[str, TaskKind]], LossWeights]
    splittable: bool = False
    after: str = ""


def uncertainty_weights(kinds: Mapping[str, TaskKind]) -> LossWeights:
    """Uncertainty weighting (Kendall, Gal, Cipolla, CVPR 2018), with TorchJD's ``UW`` at twice the loss of classifications.

    With ``s_t = log sigma_t^2``, at first 0, the term of a number with its squared error is ``exp(-s) L / 2 + s / 2``
    (eq. 7), and that of a classification with its cross-entropy ``exp(-s) L + s / 2`` (eq. 10). TorchJD has the former
    for all.
    """
    factors = torch.tensor([1.0 if kind.name == "number" else 2.0 for kind in kinds.values()])
    return LossWeights(need("torchjd.scalarization").UW(len(kinds)), factors)


UNCERTAINTY = LossWeighting("Uncertainty weighting", uncertainty_weights)

#: Values where TorchJD has no default: mu as the paper tried it (0.01 to 1).
_ARGUMENTS: Mapping[str, Mapping[str, Any]] = {"STCH": {"mu": 0.1}}
_PREFERENCES = "needs a preference between the tasks"
_UNUSABLE = {"COSMOS": _PREFERENCES, "PBI": _PREFERENCES, "Constant": _PREFERENCES, "Scalarizer": "is their base class"}
_AFTER = {"FAMO": "step", "DWA": "epoch"}


def torchjd_loss_weighting(name: str) -> LossWeighting:
    """Any scalarizer of TorchJD by its name: ``UW``, ``FAMO``, ``IMTLL``, ``GeometricMean``, ``STCH``, ``DWA``, ...

    Raises:
        OptionError: there is none, or it cannot be used here; the message says why.
        ImportError: TorchJD is not installed.
    """
    kind = _kind_of(name)
    needed = [
        own.name
        for own in inspect.signature(kind).parameters.values()
        if own.default is own.empty and own.name not in ("shape", *_ARGUMENTS.get(name, {}))
    ]
    if needed:
        raise OptionError(f"{name} of this version of TorchJD needs {needed}, for which no values are known here.")
    return LossWeighting(f"TorchJD {name}", partial(_built, name), name == "Sum", _AFTER.get(name, ""))


def _kind_of(name: str) -> Any:
    scalarization = need("torchjd.scalarization")
    if name in _UNUSABLE or name not in scalarization.__all__:
        usable = ", ".join(sorted(set(scalarization.__all__) - set(_UNUSABLE)))
        why = f"{name} {_UNUSABLE[name]}" if name in _UNUSABLE else f"TorchJD has no scalarizer {name!r}"
        raise OptionError(f"{why}. Use one of {usable}.")
    return getattr(scalarization, name)


def _built(name: str, kinds: Mapping[str, TaskKind]) -> LossWeights:
    kind = _kind_of(name)
    shape = (len(kinds),) if "shape" in inspect.signature(kind).parameters else ()
    scalarizer = kind(*shape, **_ARGUMENTS.get(name, {}))
    if name == "DWA":
        return DWAWeights(scalarizer, len(kinds))
    return (FAMOWeights if name == "FAMO" else LossWeights)(scalarizer)
