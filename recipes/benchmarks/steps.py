"""The training steps that the overhead recipe times, on a model of ResNet-18's shape."""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from saliency_reg import FeatureSurgery, ParameterSurgery, PCGrad, SaliencyRegularizer, relation_report

from ..models.small_resnet import ResidualBlock

#: One training step, from the forward pass to the optimizer.
Step = Callable[[], None]
#: Methods of :class:`Steps` that are timed beside the plain step, and those that take too long with many tasks.
FAST = ("regularizer", "floor", "surgery", "regularizer_surgery", "views")
#: Steps from one TAG to the next: ratios of steps with it are those of so many together.
TAG_EVERY = 10
SLOW = ("loop", "parameters", "torchjd", "textbook")
#: Other shapes of the model, and the kinds of steps that are timed on them.
VARIANTS = {"heads_alone": ("regularizer",), "linear": ("surgery", "regularizer_surgery"), "two-layer": ("surgery",)}


class ManyHeads(nn.Module):
    """ResNet-18 up to its pooled vector, and T heads of two layers on it.

    Args:
        tasks: T.
        width: channels of the first stage; 64 is ResNet-18.
        columns: instead, one head with a column per task: ``"linear"``, or ``"two-layer"``.
    """

    def __init__(self, tasks: int, width: int = 64, columns: str | None = None) -> None:
        super().__init__()
        self.tasks = tasks
        stem = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        stages: list[nn.Module] = [stem, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        channels = width
        for stage in range(4):
            outputs = width * 2**stage
            stages += [ResidualBlock(channels, outputs, 1 if stage == 0 else 2), ResidualBlock(outputs, outputs, 1)]
            channels = outputs
        self.backbone = nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten())

        def head(size: int) -> nn.Module:
            if columns == "linear":
                return nn.Linear(channels, size)
            return nn.Sequential(nn.Linear(channels, 128), nn.GELU(), nn.Linear(128, size))

        self.heads = nn.ModuleList([head(1) for _ in range(tasks)] if columns is None else [head(tasks)])

    @property
    def attachment(self) -> dict[str, Any]:
        """Tell the library where the tasks are."""
        if len(self.heads) == self.tasks:
            return {"heads": "heads"}
        return {"heads": "heads.0", "tasks": [str(task) for task in range(self.tasks)]}

    def forward(self, images: Tensor) -> list[Tensor]:
        feature = self.backbone(images)
        return [column for head in self.heads for column in head(feature).split(1, dim=1)]


def make_data(tasks: int, batch_size: int, size: int) -> tuple[Tensor, Tensor]:
    """Return images ``[B, 3, size, size]`` and labels ``[B, T]``: the time of a step does not depend on what they show."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, size, size, generator=generator)
    return images, torch.randint(2, (batch_size, tasks), generator=generator).float()


def training_step(
    optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], penalty: Callable[[], Tensor] | None = None
) -> Step:
    """Return a step on a loss, and on a penalty if there is one, which is computed after it."""

    def backward() -> None:
        total = loss() if penalty is None else loss() + penalty()
        total.backward()  # type: ignore[no-untyped-call]

    return _step(optimizer, backward)


def _step(optimizer: torch.optim.Optimizer, backward: Callable[[], None]) -> Step:
    def step() -> None:
        optimizer.zero_grad()
        backward()
        optimizer.step()

    return step


class Steps:
    """The kinds of steps on a model, maybe in ``DistributedDataParallel``, and a batch of images and labels.

    Each method attaches what it needs to the model, and returns the step. Of more tasks than ``sampled`` the regularizer
    takes so many at each step.
    """

    def __init__(
        self, model: ManyHeads | DistributedDataParallel, images: Tensor, labels: Tensor, sampled: int | None = None
    ) -> None:
        self._called = model
        self._model: ManyHeads = model.module if isinstance(model, DistributedDataParallel) else model
        self._images, self._labels, self._sampled = images, labels, sampled
        self._optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def _losses(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        labels = self._labels.unbind(1)
        return [functional.binary_cross_entropy_with_logits(z[:, 0], y) for z, y in zip(outputs, labels)]

    def _loss(self) -> Tensor:
        return torch.stack(self._losses(self._called(self._images))).sum()

    def plain(self) -> Step:
        """Equal weighting."""
        return training_step(self._optimizer, self._loss)

    def regularizer(self, **options: Any) -> Step:
        """The same with the two lines of this package, and a strength that acts from the first step."""
        options = {"strength": 0.1, "metric": "l1", "max_tasks_per_step": self._sampled, **options}
        options = {"optimizer": self._optimizer, **options}
        regularizer = SaliencyRegularizer(self._called, **self._model.attachment, **options)
        return training_step(self._optimizer, self._loss, regularizer)

    def regularizer_surgery(self, **options: Any) -> Step:
        """The same with gradient surgery at the feature map."""
        return self.regularizer(surgery=PCGrad(), **options)

    def views(self) -> Step:
        """The same without surgery, and a report of the five views of the tasks' relations."""
        regularizer = SaliencyRegularizer(
            self._called,
            **self._model.attachment,
            strength=0.1,
            metric="l1",
            max_tasks_per_step=self._sampled,
            optimizer=self._optimizer,
        )
        report = relation_report(regularizer, tag_every=TAG_EVERY)

        def penalty() -> Tensor:
            found: Tensor = regularizer()
            report.update(self._labels)
            return found

        return training_step(self._optimizer, self._loss, penalty)

    def surgery(self) -> Step:
        """Gradient surgery at the feature map, without the penalty."""
        FeatureSurgery(self._model, **self._model.attachment)
        return self.plain()

    def parameters(self) -> Step:
        """Gradient surgery on the backbone's parameters: a backward pass for each task."""
        surgery = ParameterSurgery(self._model, PCGrad(), optimizer=self._optimizer)
        return _step(self._optimizer, lambda: surgery.backward(self._losses(self._model(self._images))))

    def torchjd(self) -> Step:
        """The same by TorchJD, one task at a time, which is faster here than its vmap."""
        from torchjd import aggregation, autojac

        aggregator = aggregation.PCGrad()

        def backward() -> None:
            feature = self._model.backbone(self._images)
            losses = self._losses([head(feature) for head in self._model.heads])
            autojac.mtl_backward(losses, features=feature, parallel_chunk_size=1)
            autojac.jac_to_grad(list(self._model.backbone.parameters()), aggregator)

        return _step(self._optimizer, backward)

    def textbook(self) -> Step:
        """The same as it is written in the paper: one gradient vector after the other, projected pair by pair."""
        shared = list(self._model.backbone.parameters())

        def backward() -> None:
            vectors = []
            for loss, head in zip(self._losses(self._model(self._images)), self._model.heads):
                own = list(head.parameters())
                found = torch.autograd.grad(loss, shared + own, retain_graph=True)
                for parameter, gradient in zip(own, found[len(shared) :]):
                    parameter.grad = gradient
                vectors.append(torch.cat([gradient.flatten() for gradient in found[: len(shared)]]))
            total = torch.zeros_like(vectors[0])
            for i, vector in enumerate(vectors):
                projected = vector.clone()
                for j in torch.randperm(len(vectors)).tolist():
                    product = projected @ vectors[j]
                    if j != i and product < 0:
                        projected -= product / (vectors[j] @ vectors[j]) * vectors[j]
                total += projected
            for parameter, part in zip(shared, torch.split(total, [parameter.numel() for parameter in shared])):
                parameter.grad = part.view_as(parameter)

        return _step(self._optimizer, backward)

    def floor(self) -> Step:
        """The double backward through the heads alone: a penalty on the saliencies' size, without pairs or relations."""
        aliases: list[Tensor] = []
        scalars: list[Tensor] = []

        def fork(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            aliases.append(args[0].view_as(args[0]))
            return (aliases[-1],)

        def penalty() -> Tensor:
            saliencies = torch.autograd.grad(scalars, aliases, create_graph=True)
            aliases.clear()
            scalars.clear()
            return 1e-3 * torch.stack(saliencies).square().sum()

        for head in list(self._model.heads)[: self._sampled]:
            head.register_forward_pre_hook(fork)
            head.register_forward_hook(lambda module, args, output: scalars.append(output.sum()))
        return training_step(self._optimizer, self._loss, penalty)

    def loop(self) -> Step:
        """The published way: a gradient for each sample and task, and a loop over samples and pairs."""
        features: list[Tensor] = []
        heads = self._model.heads
        weight = 2 / (len(heads) * (len(heads) - 1))
        self._model.backbone.register_forward_hook(lambda module, args, output: features.append(output))

        def penalty() -> Tensor:
            feature = features.pop()
            total = feature.new_zeros(())
            for sample in feature.split(1):  # type: ignore[no-untyped-call]
                rows = [torch.autograd.grad(head(sample).sum(), sample, create_graph=True)[0] for head in heads]
                for row, other in itertools.combinations(rows, 2):
                    total = total + weight * (row - other).abs().sum()
            return 0.1 * total / len(feature)

        return training_step(self._optimizer, self._loss, penalty)


def tasks_sampled(tasks: int, options: argparse.Namespace) -> int | None:
    """Return how many tasks the regularizer samples at each step; ``None``: it takes all."""
    most: int = options.max_tasks_per_step
    return most if tasks > most else None


def make_steps(
    names: Sequence[str], tasks: int, options: argparse.Namespace, variant: str | None = None, group: Any = None
) -> dict[str, Step]:
    """Make steps of some kinds, each on a copy of one model, with the options of the overhead recipe.

    Args:
        names: of methods of :class:`Steps`; in several processes, those that end in ``_local`` have no collectives.
        tasks: how many the model has.
        options: of the overhead recipe.
        variant: ``"linear"`` or ``"two-layer"``: one head with a column per task; ``"heads_alone"``: the heads on a fixed
            vector that requires grad, without a backbone.
        group: in several processes, that of the regularizer's collectives. Each model is in ``DistributedDataParallel``.
    """
    torch.manual_seed(0)
    model = ManyHeads(tasks, options.width, None if variant == "heads_alone" else variant)
    images, labels = make_data(tasks, options.batch_size, options.size)
    if variant == "heads_alone":
        images = torch.randn(options.batch_size, 8 * options.width).requires_grad_()
        model.backbone = nn.Sequential()
    steps = {}
    for name in names:
        own = copy.deepcopy(model)
        wrapped = own if group is None else DistributedDataParallel(own)
        kind = name.removesuffix("_local")
        chosen = {} if group is None or kind == "plain" else {"process_group": group if kind == name else "local"}
        steps[name] = getattr(Steps(wrapped, images, labels, tasks_sampled(tasks, options)), kind)(**chosen)
    return steps
