"""A weighting of TorchJD with draws of its own, and with state that resumes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.errors import OptionError, need
from .kept_state import kept_in, restore

#: What their papers take where TorchJD has no default: CAGrad c (NYUv2 0.4, 0.5 in LibMTL), FairGrad alpha.
_ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "CAGrad": {"c": 0.5},
    "FairGrad": {"alpha": 2.0},
    "MGDA": {"epsilon": 1e-5, "max_iters": 250},
}
_WITHOUT_A_WEIGHTING = "is no weighted sum whose weights depend on the inner products of the gradients alone"
_TWO_BATCHES = "needs the inner products between the gradients of two batches"
#: Those that cannot be used, and why.
_UNUSABLE = {
    "ConFIG": _WITHOUT_A_WEIGHTING,
    "GradDrop": _WITHOUT_A_WEIGHTING,
    "TrimmedMean": _WITHOUT_A_WEIGHTING,
    "ExcessMTL": "keeps state of each parameter",
    "NashMTL": "needs the number of tasks before it is built, and depends on the size of the gradients",
    "MoDo": _TWO_BATCHES,
    "SDMGrad": _TWO_BATCHES,
    "Constant": "needs weights; weigh the losses instead",
    "CRMOGM": "wraps another weighting",
    "Krum": "needs the number of adversaries among the tasks",
}


def torchjd_weighting(name: str, seed: int) -> TorchJDWeighting:
    """The Gramian weighting that TorchJD calls ``<name>Weighting``, with the seed of its draws.

    Raises:
        OptionError: there is none, or it cannot be used here; the message says why.
        ImportError: TorchJD, or what this weighting needs beside it, is not installed.
    """
    aggregation = need("torchjd.aggregation")
    # Without a name it is their base class.
    kind = getattr(aggregation, f"{name}Weighting", None) if name else None
    if name in _UNUSABLE or not isinstance(kind, type):
        known = sorted(one.removesuffix("Weighting") for one in dir(aggregation) if one.endswith("Weighting"))
        usable = ", ".join(one for one in known if one and one not in _UNUSABLE)
        why = f"{name} {_UNUSABLE[name]}" if name in _UNUSABLE else f"TorchJD has no weighting {name!r}"
        raise OptionError(f"{why}. Use one of {usable}.")
    arguments = _ARGUMENTS.get(name, {})
    needed = [
        own.name
        for own in inspect.signature(kind).parameters.values()
        if own.default is own.empty and own.name not in arguments
    ]
    if needed:
        raise OptionError(f"{name} of this version of TorchJD needs {needed}, for which no values are known here.")
    return TorchJDWeighting(kind(**arguments), seed)


class TorchJDWeighting(nn.Module):
    """Calls a weighting of TorchJD, which draws from the global generator, with one that depends on seed and call alone.

    So methods that draw have the batches and masks of those that do not. What it keeps is in the ``state_dict``, also what
    TorchJD keeps outside of buffers, or in buffers that are not there at first.

    Args:
        weighting: ``[T, T] -> [T]``.
        seed: of its draws.
    """

    def __init__(self, weighting: nn.Module, seed: int) -> None:
        super().__init__()
        self._weighting = (weighting,)  # hidden: its buffers come and go
        self._seed = seed
        self._calls = 0
        if callable(reset := getattr(weighting, "reset", None)):
            self.reset = reset

    def forward(self, gramian: Tensor) -> Tensor:
        """Return the weights."""
        (weighting,) = self._weighting
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed((self._seed * 1_000_003 + self._calls) % 2**63)
            weights: Tensor = weighting(gramian)
        self._calls += 1
        return weights

    def get_extra_state(self) -> dict[str, Any]:
        """Seed, number of calls, and what each module of the weighting keeps."""
        return {"seed": self._seed, "calls": self._calls, "kept": kept_in(self._weighting[0], buffers=True)}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken."""
        self._seed, self._calls = state["seed"], state["calls"]
        restore(self._weighting[0], state["kept"])
