"""The kinds of gradient surgery that methods have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saliency_reg import PCGrad

from ..runtime.errors import OptionError, need
from .torchjd_weighting import torchjd_weighting


@dataclass(frozen=True)
class Surgery:
    """One kind of gradient surgery.

    Attributes:
        label: for people.
        weighting: from the seed of a training to a weighting; a function that has a name, so that it reaches workers.
        on_parameters: on the parameters of the backbone; otherwise at the feature map that the heads share.
    """

    label: str
    weighting: Callable[[int], Any]
    on_parameters: bool = False


def shortest_combination(gramian: Tensor) -> Tensor:
    """Weights ``>= 0`` with the sum 1 of the shortest convex combination of T gradients, from their Gramian ``[T, T]``.

    Exact, as a nonnegative least-squares problem (Lawson and Hanson): with ``G = L L'``, and ``x >= 0`` that minimises
    ``|L'x|^2 / s^2 + (1'x - 1)^2``, they are ``x / 1'x``, for any ``s > 0``: in a given direction the minimum depends on
    ``|L'x| / 1'x`` alone, and grows with it. The Frank-Wolfe solver of Sener and Koltun, as TorchJD has it, ends up to 42 %
    above that minimum with its defaults.
    """
    scipy = need("scipy.optimize")
    values, vectors = torch.linalg.eigh(gramian.detach().double().cpu())
    factor = vectors * values.clamp(min=0).sqrt()  # L
    size = factor.norm(dim=1).max()
    rows = torch.cat([(factor / size).T, torch.ones(1, len(factor), dtype=torch.float64)])
    target = torch.zeros(len(rows), dtype=torch.float64)
    target[-1] = 1
    solution, _ = scipy.nnls(rows.numpy(), target.numpy(), maxiter=100 * len(factor))
    found = torch.from_numpy(solution)
    return (found / found.sum()).to(gramian)


def mgda(seed: int) -> Callable[[Tensor], Tensor]:
    """Weights of the shortest convex combination of the gradients (Sener and Koltun, NeurIPS 2018, eq. 3)."""
    del seed  # it draws nothing
    return shortest_combination


def mgda_of_unit_gradients(seed: int) -> Callable[[Tensor], Tensor]:
    """Weights of the shortest convex combination of unit gradients: an option of their code that is not in the paper."""
    del seed
    return shortest_combination_of_unit_gradients


def shortest_combination_of_unit_gradients(gramian: Tensor) -> Tensor:
    """As :func:`shortest_combination`, of the gradients divided by their lengths."""
    lengths = gramian.diagonal().sqrt()  # never zero: tasks without a gradient do not come here
    return shortest_combination(gramian / lengths / lengths.unsqueeze(1))


def torchjd_surgery(name: str) -> Surgery:
    """Any Gramian weighting of TorchJD by its name: ``UPGrad``, ``CAGrad``, ``GradVac``, ...

    At the feature map, or with ``@parameters`` behind the name on the parameters of the backbone. Arguments that TorchJD has
    no default for are those of the papers.

    Raises:
        OptionError: there is none, or it cannot be used here; the message says why.
        ImportError: TorchJD, or what this weighting needs beside it, is not installed.
    """
    base, at, level = name.partition("@")
    if at and level != "parameters":
        raise OptionError(f"found {name!r}. Use {base} for surgery at the feature map, or {base}@parameters.")
    torchjd_weighting(base, 0)  # what cannot be built is told now
    label = f"TorchJD {base} ({'parameters' if at else 'feature'})"
    return Surgery(label, partial(torchjd_weighting, base), on_parameters=bool(at))


PCGRAD = Surgery("PCGrad (feature)", PCGrad)
PCGRAD_PARAMETERS = Surgery("PCGrad (parameters)", PCGrad, on_parameters=True)
#: At the feature map, where it gives most to the smallest gradient.
MGDA_UB = Surgery("MGDA-UB", mgda)
MGDA_UB_UNIT = Surgery("MGDA-UB, unit gradients", mgda_of_unit_gradients)
