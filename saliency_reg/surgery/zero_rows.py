"""Whether a weighting with state can be shown the zero gradients of tasks that are absent from a step."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

#: Calls of the trial: what is learned slowly has to show, too.
_CALLS = 10
_VERDICT = "_saliency_reg_takes_zero_rows"


def takes_zero_rows(weighting: Any, num_tasks: int) -> bool:
    """Tell whether zero rows of the Gramian leave the direction among the other tasks, and their share, as they are.

    Weightings that keep state by position (running targets of each pair in GradVac, lengths in PCD, whose first row is the
    primary task, averaged weights in CR-MOGM) need the Gramian of all T tasks, or what they keep would go to other tasks.
    Those that look for a short combination of the gradients (MGDA, MoDo, SDMGrad) cannot have it: all weight would go to a
    zero gradient. Which kind one is, is found by a trial, once, with copies that begin anew: two tasks with a gradient among
    ``num_tasks``, against these two alone. One that cannot be called with two tasks has no choice.

    Weightings without a ``reset()`` are not asked: they keep nothing. Nor are those that cannot be copied.
    """
    if not callable(getattr(weighting, "reset", None)):
        return False
    known: dict[int, bool] = vars(weighting).setdefault(_VERDICT, {})
    if num_tasks not in known:
        known[num_tasks] = _tried(weighting, num_tasks)
    return known[num_tasks]


def _tried(weighting: Any, num_tasks: int) -> bool:
    # Their sizes differ, they are in conflict, and large enough for steps that depend on the size to go all the way.
    pair = 1e4 * torch.tensor([[1.0, -0.5], [-0.5, 2.0]], dtype=torch.float64)
    whole = torch.zeros(num_tasks, num_tasks, dtype=torch.float64)
    whole[:2, :2] = pair
    try:
        with_zeros = _final_weights(weighting, whole)
    except Exception:  # whatever it raises, here and below
        return False
    try:
        alone = _final_weights(weighting, pair)
    except Exception:
        return bool(torch.isfinite(with_zeros[:2]).all())
    if with_zeros[:2].abs().sum() < 0.9 * 2 / num_tasks * alone.abs().sum():  # a mean over the tasks has 2 / T of it
        return False
    ours, theirs = (weights[:2] / weights[:2].abs().sum() for weights in (with_zeros, alone))
    return torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3)  # not where they are NaN


def _final_weights(weighting: Any, gramian: Tensor) -> Tensor:
    own = copy.deepcopy(weighting)
    own.reset()
    with torch.random.fork_rng(devices=[]):  # its draws are none of the training's
        torch.default_generator.manual_seed(0)
        for _ in range(_CALLS):
            weights = own(gramian)
    found: Tensor = weights.detach().double().cpu()
    return found
