"""What has to hold of one training step with the regularizer, and what becomes of a check that fails."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from saliency_reg import SaliencyRegularizer


class CheckFailedError(Exception):
    """A step ran, but not as it must."""


def must(holds: bool, found: str) -> None:
    """Raise CheckFailedError with what was found, unless it holds."""
    if not holds:
        raise CheckFailedError(f"found {found}")


def reason_of(error: BaseException) -> str:
    """Kind, place and words of an error, for a table."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
    return f"{type(error).__name__} at {place}: {' '.join(str(error).split())[:300]}"


def attempt(way: str, check: Callable[[], None], result: dict[str, Any]) -> bool:
    """Tell whether a check passes; its warnings join the ``notes`` of the result, its error the ``reasons``."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            check()
        except Exception as error:  # of any kind: it is told in the table
            result["reasons"][way] = reason_of(error)
    told = [f"{way}: {' '.join(str(each.message).split())[:120]}" for each in caught]
    result["notes"] = list(dict.fromkeys(result["notes"] + told))
    return way not in result["reasons"]


def check_step(
    shared: nn.Module,
    regularizer: SaliencyRegularizer,
    optimizer: torch.optim.Optimizer,
    losses: Mapping[str, Tensor],
) -> None:
    """Raise CheckFailedError unless penalty, backward pass under surgery, and optimizer step are as they must be."""
    penalty = regularizer(losses=losses)
    works = bool(penalty.isfinite()) and bool(penalty > 0) and penalty.requires_grad
    must(works, f"a penalty of {float(penalty.detach())}")
    loss: Tensor = torch.stack(list(losses.values())).sum() + penalty
    loss.backward()  # type: ignore[no-untyped-call]
    report = regularizer.report
    must(report is not None and report.surgery is not None, "no report of the surgery")
    gradients = [parameter.grad for parameter in shared.parameters() if parameter.grad is not None]
    must(bool(gradients) and all(bool(gradient.isfinite().all()) for gradient in gradients), "gradients not finite")
    must(any(bool(gradient.any()) for gradient in gradients), "gradients that are all zero")
    before = [parameter.detach().clone() for parameter in shared.parameters()]
    optimizer.step()
    moved = any(not torch.equal(old, new) for old, new in zip(before, shared.parameters()))
    must(moved, "no parameter that moved")
    must(int(regularizer.relations.updates) == 1, "relations that did not move")
