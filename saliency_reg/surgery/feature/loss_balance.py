"""The loss weights of GradNorm: what moves them, and the step that does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...torch_tools import StateModule, real_device


class LossBalance(StateModule):
    r"""One weight per task, moved towards gradient lengths that follow the training rates (Chen et al. 2018, eq. 1, 2).

    As a weighting, it maps any Gramian to the weights of now.

    Args:
        num_tasks: T.
        asymmetry: the power of the training rates, ``>= 0``.
        learning_rate: by how much the logarithm of a weight moves, ``> 0``.
        initial_losses: T numbers ``> 0``; by default the losses of the first step in which a task has a gradient.
    """

    #: A weight does not depend on which gradients there are.
    ignores_zero_gradients = True
    weights: Tensor
    initial_losses: Tensor
    squared_norms: Tensor
    losses: Tensor
    factors: Tensor

    def __init__(
        self, num_tasks: int, asymmetry: float, learning_rate: float, initial_losses: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        self.asymmetry = asymmetry
        self.learning_rate = learning_rate
        zeros = torch.zeros(num_tasks, dtype=torch.float64, device=real_device())
        self.register_buffer("weights", torch.ones_like(zeros))
        #: ``[T]``; 0 where it is not known yet.
        self.register_buffer(
            "initial_losses", zeros if initial_losses is None else zeros + zeros.new_tensor(initial_losses)
        )
        # Of the backward passes since the latest update.
        self.register_buffer("squared_norms", zeros.clone())
        self.register_buffer("losses", zeros.clone())
        self.register_buffer("factors", zeros.clone())

    def forward(self, gramian: Tensor) -> Tensor:
        """Return the weights of now, ``[T, T] -> [T]``."""
        return self.weights.to(gramian)

    @torch.no_grad()
    def add(self, squared_norms: Tensor, losses: Tensor, factors: Tensor) -> None:
        """Take up a backward pass; one that is not finite is left out.

        Args:
            squared_norms: ``[T]`` of the task gradients, before they were weighed.
            losses: ``[T]``, 0 for a task without one, multiplied by the ``factors``.
            factors: ``[T]``, with which the backward pass began: the loss scale, and a micro-batch's share of the step; 0
                for a task without a loss, so that losses are averaged over the micro-batches and processes that have one.
        """
        found = torch.cat([squared_norms, losses, factors])
        if bool(torch.isfinite(found).all()):
            self.squared_norms += squared_norms.to(self.weights)
            self.losses += losses.to(self.weights)
            self.factors += factors.to(self.weights)

    @torch.no_grad()
    def update(self) -> None:
        r"""Move the weights by what was added, and forget that.

        With ``G_t = w_t |g_t|``, its mean ``M`` and the target ``R_t = M r_t^a`` as constants, each weight is multiplied by
        ``exp(+-learning_rate)``, against the sign of the derivative of ``sum_t |G_t - R_t|``. Then the weights of the tasks
        that took part are scaled to the sum that they had. Those are the tasks with a gradient, if there are two of them.
        """
        squared_norms, losses, factors = self.squared_norms.clone(), self.losses.clone(), self.factors.clone()
        for buffer in (self.squared_norms, self.losses, self.factors):
            buffer.zero_()
        losses /= torch.where(factors == 0, 1.0, factors)
        present = squared_norms > 0
        self.initial_losses += torch.where(present & (self.initial_losses == 0), losses, 0.0)
        present &= self.initial_losses > 0
        rates = losses[present] / self.initial_losses[present]
        if len(rates) < 2 or rates.sum() == 0:
            return
        before = self.weights[present]
        lengths = before * squared_norms[present].sqrt()
        targets = lengths.mean() * (rates / rates.mean()) ** self.asymmetry
        moved = before * torch.exp(-self.learning_rate * torch.sign(lengths - targets))
        self.weights[present] = moved * (before.sum() / moved.sum())
