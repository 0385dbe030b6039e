"""What has to hold of one training step with the regularizer, for the sweeps over many architectures."""

from __future__ import annotations

import argparse
import difflib
import traceback
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from saliency_reg import SaliencyRegularizer

__all__ = ["CheckFailedError", "check_names", "check_step", "must", "reason_of"]


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


def check_step(
    shared: nn.Module,
    regularizer: SaliencyRegularizer,
    optimizer: torch.optim.Optimizer,
    losses: Mapping[str, Tensor],
) -> None:
    """Penalty, backward pass under surgery, and optimizer step.

    Raises:
        CheckFailedError: one of them is not as it must be.
    """
    penalty = regularizer(losses=losses)
    must(
        bool(penalty.isfinite()) and bool(penalty > 0) and penalty.requires_grad,
        f"a penalty of {float(penalty.detach())}",
    )
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


def check_names(
    parser: argparse.ArgumentParser, argument: str, chosen: Sequence[str], known: Collection[str], what: str
) -> None:
    """End with an error that says what is near, if one of the names is not known.

    Args:
        parser: that ends.
        argument: what the names were given as.
        chosen: names.
        known: all there are.
        what: in front of a name that is not there, such as "timm has no family".
    """
    for name in chosen:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f" Did you mean {', '.join(near)}?" if near else ""
            parser.error(f"argument {argument}: {what} {name!r}.{hint} They are: {' '.join(known)}")
