"""The classical penalties on head weights as an object of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ..capture import ColumnsChoice, HeadsChoice, resolve_heads
from ..errors import CaptureError, ConfigurationError, MissingArgumentError, StateMismatchError, WrongTypeError
from ..tasks import first_few
from ..torch_tools import (
    Removable,
    StateModule,
    StepHook,
    check_choice,
    names_from_bytes,
    names_to_bytes,
    non_negative_number,
    real_device,
    share_below_one,
    unwrap_optimizer,
    version_of,
    whole_number,
    without_autocast,
)
from .head_weights import HeadWeights
from .learning_rates import groups_of, rates_of
from .proximal import l1_step, l1_value, l21_step, l21_value
from .task_covariance import (
    correlation_of,
    covariance_of,
    gramian,
    initial_variance,
    is_positive_definite,
    precision_of,
)

_SPARSE = ("lasso", "l21")
_LEARNED = ("mrn", "mtrl")
KINDS = (*_SPARSE, "mean", *_LEARNED)


class HeadPenalty(StateModule, Removable):
    r"""Lasso, L21, mean-regularised multi-task learning, MRN and MTRL: penalties on the weights of the heads.

    ``U_t`` ``[h_t, D]`` is the weight of the first ``Linear`` or convolution of head ``t`` (or its rows in one for all
    tasks), first in the order in which the head's ``__init__`` sets them (:attr:`weight_names` says which),
    ``w_t`` the same as a vector of M entries, ``W`` ``[T, M]`` all of them. ``penalty()`` is ``strength`` times

    - ``"lasso"``: ``sum_t |U_t|_1`` (Tibshirani, JRSS-B 1996).
    - ``"l21"``: ``sum_d |u_d|_2``, ``u_d`` being what all heads have for input ``d`` (of a convolution: for input channel
      ``d``), so that an input is kept or dropped for all tasks together (Argyriou, Evgeniou and Pontil, NIPS 2006).
    - ``"mean"``: ``sum_t |w_t - wbar|^2``, ``wbar`` the mean over the tasks (Evgeniou and Pontil, KDD 2004, whose
      ``w_t = w_0 + v_t`` comes to this ``strength`` and a ``ridge``). It counts the deeper weights of the heads, too, up to
      the first that has not the same shape in all of them.
    - ``"mrn"``: ``1/2 tr(W' S^-1 W)`` with a covariance ``S`` of the tasks, ``W W'`` with trace T (Long et al., NIPS 2017).
      Of the paper's three factors only that of the tasks is learned, as in the authors' code: one tensor is one sample, from
      which all three cannot be estimated. By the fixed trace, which theirs lacks, the strength does not grow as weights
      shrink; it begins with ``S = I``, as a weight decay.
    - ``"mtrl"``: ``tr(W' Om^-1 W)``, ``Om = (W W')^(1/2)`` with trace 1 (Zhang and Yeung, UAI 2010), the convex relative: at
      an update without shrinkage it is the squared nuclear norm of ``W``.

    Biases and normalisations are never penalised. Where a backbone is trained, features can grow while weights shrink, until
    the penalty is small and nothing is sparse: freeze it, normalise its features, or keep its weight decay. Weight decay of
    the penalised weights themselves counts on top (with lasso, an elastic net); a parameter group of their own with
    ``weight_decay=0`` avoids it.

    Lasso and L21 are proximal, and decoupled from the optimizer as the weight decay of AdamW is: after each of its steps,
    their proximal operator is applied with the threshold ``lr * strength``, with the ``lr`` of the parameter group then, and
    weights become exactly 0. What ``penalty()`` returns then has **no gradient**; added to the loss, it makes it the
    objective. With plain SGD this is ISTA; momentum and Adam's metric are not in the threshold. The other kinds are smooth
    and act by their gradient. All penalise the heads of tasks without labels in a batch, too.

    Steps that GradScaler skips do not count. In several processes weights are alike, and nothing is communicated. With
    ``DistributedDataParallel(find_unused_parameters=True)`` a smooth kind needs every head in each forward: torch refuses
    gradients of parameters that had no part in it.

    Args:
        model: the model, or a wrapper around it; before it is compiled.
        heads, tasks, columns: as in :class:`SaliencyRegularizer`. One head of all tasks is one ``Linear`` or convolution.
        kind: one of the names above.
        strength: ``>= 0``; 0 changes nothing (but for a ridge).
        optimizer: the one that trains the heads; needed for all kinds but ``"mean"``.
        ridge: of the smooth kinds: adds ``ridge * sum_t |w_t|^2``, ``>= 0``, by default 0.
        shrinkage: ``g`` of MRN and MTRL, in ``[0, 1)``, by default 0.1: ``S <- (1 - g) S + g (tr S / T) I`` in each update.
            Without it the penalty is up to 1000 times as strong in directions in which the tasks had no weights (of more
            tasks than M there are always some), which few learning rates stand.
        update_steps: of MRN and MTRL: the covariance is updated after every so many optimizer steps, by default 20 (MRN's
            authors: 100 of 30,000).

    Attributes:
        covariance: of MRN and MTRL: ``[T, T]``, float64; else ``None``.
        steps: 0-dim, the optimizer steps so far.

    Raises:
        ConfigurationError: an option out of range, or not of this kind; weights that are sharded, frozen, parametrised, or
            not in the optimizer.
        MissingArgumentError: no optimizer.
        ShapeError: first layers that differ in what the kind compares.
        SaliencyRegError: another of its kinds, for arguments that cannot work.

    Example:
        >>> model = nn.ModuleDict({"backbone": nn.Linear(8, 4), "heads": nn.ModuleDict()})
        >>> for task in ("smiling", "young"):
        ...     model["heads"][task] = nn.Linear(4, 1)
        >>> optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        >>> penalty = HeadPenalty(model, heads="heads", kind="l21", strength=100.0, optimizer=optimizer)
        >>> feature = model["backbone"](torch.randn(16, 8))
        >>> losses = [head(feature).square().mean() for head in model["heads"].values()]
        >>> (sum(losses) + penalty()).backward()
        >>> optimizer.step()
        >>> penalty.zeros
        1.0
    """

    steps: Tensor
    built_for: Tensor
    covariance: Tensor | None
    any_values: ClassVar[tuple[str, ...]] = ("covariance",)

    # A copy is not attached: model and optimizer belong to the original.
    in_a_copy: ClassVar[dict[str, Any]] = {"_weights": None, "_optimizer": None, "_step_hook": None, "_inverse": None}

    def __init__(
        self,
        model: nn.Module,
        heads: HeadsChoice = None,
        *,
        kind: str,
        strength: float,
        tasks: Sequence[str] | None = None,
        columns: ColumnsChoice = None,
        optimizer: Any = None,
        ridge: float | None = None,
        shrinkage: float | None = None,
        update_steps: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise WrongTypeError(f"model must be a torch.nn.Module, found {type(model).__name__}.")
        check_choice("kind", kind, KINDS)
        self.kind = kind
        self.strength = non_negative_number("strength", strength)
        given = {"ridge": ridge, "shrinkage": shrinkage, "update_steps": update_steps}
        own = [] if kind in _SPARSE else ["ridge"] if kind == "mean" else [*given]
        if foreign := [name for name, value in given.items() if value is not None and name not in own]:
            raise ConfigurationError(f"kind={kind!r} has no {foreign[0]}. Leave {foreign[0]}= out.")
        self.ridge = 0.0 if ridge is None else non_negative_number("ridge", ridge)
        self.shrinkage = 0.1 if shrinkage is None else share_below_one("shrinkage", shrinkage)
        self.update_steps = 20 if update_steps is None else whole_number("update_steps", update_steps, least=1)
        found = resolve_heads(model, heads, tasks, columns)
        weights = HeadWeights(model, found, deep=kind == "mean")
        if kind == "l21":
            weights.check_groups()
        elif kind != "lasso":
            weights.check_alike(kind)
        if not any(weight.parameter().requires_grad for weight in weights.all()):
            raise ConfigurationError(
                f"the weights {first_few(weights.names())} are frozen, so that a penalty changes nothing. Unfreeze "
                "the heads first."
            )
        self.tasks = found.tasks
        self._weights: HeadWeights | None = weights
        self._inverse: tuple[Any, Tensor] | None = None
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=real_device()))
        self.register_buffer("built_for", names_to_bytes([kind, *found.tasks]))
        begin = torch.eye(len(found.tasks), dtype=torch.float64, device="cpu") * initial_variance(
            kind, len(found.tasks)
        )
        self.register_buffer("covariance", begin if kind in _LEARNED else None)
        self._optimizer: torch.optim.Optimizer | None = None
        self._step_hook: StepHook | None = None
        if optimizer is not None:
            self.attach_optimizer(optimizer)
        elif kind != "mean":
            acts = "shrinks the weights" if kind in _SPARSE else "updates the covariance of the tasks"
            raise MissingArgumentError(
                f"kind={kind!r} {acts} after the steps of an optimizer. Pass optimizer=optimizer."
            )

    @_disable_dynamo
    def forward(self) -> Tensor:
        """Return the penalty of the weights as they are now; it needs no forward of the model.

        Returns:
            0-dim, ``>= 0``, float32 or float64, on the device of the weights. Without a gradient for lasso and L21, which
            act after the optimizer's step.

        Raises:
            CaptureError: this is a copy, or was removed.
            ConfigurationError: the weights were sharded, replaced by a parametrisation, or have another shape than before.
        """
        weights = self._attached()
        if self.kind in _SPARSE:
            with torch.no_grad():
                blocks = [weight.inputs_first() for weight in weights.first]
                return self.strength * (l1_value(blocks) if self.kind == "lasso" else l21_value(blocks))
        if self.strength == self.ridge == 0:  # a gradient of zeros is not none, to an optimizer
            first = weights.first[0].parameter()
            return torch.zeros((), device=first.device)
        stacks = weights.stacked()
        with without_autocast(stacks[0]):
            total = torch.stack([self._smooth(stack).to(stacks[0].device) for stack in stacks]).sum()
        return total

    @torch.no_grad()
    def step(self) -> None:
        """What the optimizer's hook calls after each of its steps: shrink the weights, or update the covariance."""
        weights = self._attached()
        steps = self._value("steps") + 1
        self._set_value("steps", steps)
        if self.kind in _SPARSE and self.strength > 0:
            self._shrink(weights)
        elif self.covariance is not None and steps % self.update_steps == 0:
            new = covariance_of(gramian(weights.stacked()[0]), self.kind, self.shrinkage)
            if new is not None:
                self.covariance.copy_(new)

    def attach_optimizer(self, optimizer: Any) -> None:
        """Follow this optimizer's steps, and no longer those of an earlier one. Wrappers around it are unwrapped.

        Raises:
            WrongTypeError: no optimizer.
            ConfigurationError: it lacks a weight, or (lasso, L21) its learning rates cannot be used.
        """
        weights = self._attached()
        inner = unwrap_optimizer(optimizer)
        groups_of(inner, weights.all())
        if self.kind in _SPARSE:
            rates_of(inner, weights.first, one=self.kind == "l21")
        if self._step_hook is not None:
            self._step_hook.remove()
        self._optimizer, self._step_hook = inner, StepHook(inner, self.step)

    def remove(self) -> None:
        """Let go of the model and of the optimizer. What was learned stays readable."""
        if self._step_hook is not None:
            self._step_hook.remove()
        self._weights = self._optimizer = self._step_hook = None

    @property
    def follows_optimizer(self) -> bool:
        """Whether an optimizer is attached."""
        return self._step_hook is not None

    @property
    def weight_names(self) -> tuple[str, ...]:
        """Names in the model of the weights that are penalised."""
        return tuple(self._attached().names())

    @property
    def zeros(self) -> float:
        """The share of the penalised weights that are exactly 0, in ``[0, 1]``."""
        with torch.no_grad():
            blocks = [weight.inputs_first() for weight in self._attached().all()]
            return sum(int((block == 0).sum()) for block in blocks) / sum(block.numel() for block in blocks)

    @property
    def relations(self) -> Tensor:
        """Of MRN and MTRL: ``[T, T]``, float64, correlations of the tasks in ``[-1, 1]``, as the covariance has them.

        Raises:
            ConfigurationError: the kind learns none.
        """
        if self.covariance is None:
            raise ConfigurationError(f"kind={self.kind!r} learns no relations between tasks. Choose one of {_LEARNED}.")
        return correlation_of(self.covariance)

    def check_loaded(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Also refuse the state of another kind or of other tasks, and a covariance that is none."""
        saved, own = state_dict.get(prefix + "built_for"), [self.kind, *self.tasks]
        if isinstance(saved, Tensor) and not saved.is_meta:
            kind, *tasks = names_from_bytes(saved) if saved.ndim == 1 else [f"a tensor of shape {list(saved.shape)}"]
            if [kind, *tasks] != own:
                raise StateMismatchError(
                    f"the state dict is that of kind={kind!r} for the tasks {tasks}, but this penalty is {self.kind!r} for "
                    f"{list(self.tasks)}. Build it with the same kind and tasks, in the same order. Nothing was loaded."
                )
        super().check_loaded(state_dict, prefix)
        matrix = state_dict.get(prefix + "covariance")
        if (
            self.covariance is not None
            and matrix is not None
            and not matrix.is_meta
            and not is_positive_definite(matrix)
        ):
            raise StateMismatchError(
                f"{prefix + 'covariance'!r} in the state dict is not a symmetric positive definite matrix. "
                "Pass the state dict of an object that was built alike; nothing was loaded."
            )

    def extra_repr(self) -> str:
        weights = "attached to no model" if self._weights is None else f"weights {first_few(self._weights.names())}"
        return f"{self.kind!r}, strength={self.strength:g}, {weights}"

    def _attached(self) -> HeadWeights:
        if self._weights is None:
            raise CaptureError(
                "this penalty is attached to no model: it was removed, or is a copy. Build one with the model and optimizer."
            )
        return self._weights

    def _smooth(self, stack: Tensor) -> Tensor:
        """The penalty on weights ``[T, M]``."""
        if self.kind == "mean":
            value = self.strength * (stack - stack.mean(0)).square().sum()
        else:
            scale = self.strength / 2 if self.kind == "mrn" else self.strength
            value = scale * (stack * (self._precision(stack) @ stack)).sum()
        return value if self.ridge == 0 else value + self.ridge * stack.square().sum()

    def _precision(self, like: Tensor) -> Tensor:
        """The inverse of the covariance, computed anew only where that has changed."""
        assert self.covariance is not None
        # The buffer itself, so that its id is not given to another.
        key = (self.covariance, version_of(self.covariance), like.device, like.dtype)
        known = self._inverse
        if known is None or known[0][0] is not key[0] or known[0][1:] != key[1:]:
            known = self._inverse = key, precision_of(self.covariance).to(like)
        return known[1]

    def _shrink(self, weights: HeadWeights) -> None:
        assert self._optimizer is not None
        trained = [weight for weight in weights.first if weight.parameter().requires_grad]
        if not trained:
            return
        rates = rates_of(self._optimizer, trained, one=self.kind == "l21")
        blocks = [weight.inputs_first() for weight in trained]
        if self.kind == "lasso":
            new = [l1_step(block, rate * self.strength) for block, rate in zip(blocks, rates)]
        else:
            new = l21_step(blocks, rates[0] * self.strength)
        for weight, block in zip(trained, new):
            weight.write(block)
