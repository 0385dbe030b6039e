"""The training steps that the overhead recipe times, on a model of ResNet-18's shape."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from saliency_reg import FeatureSurgery, ParameterSurgery, PCGrad, SaliencyRegularizer

from ..models.small_resnet import ResidualBlock

#: One training step, from the forward pass to the optimizer.
Step = Callable[[], None]
#: Kinds of steps that are timed beside the plain one, and those that take too long with many tasks.
FAST = ("regularizer", "floor", "surgery", "regularizer_surgery")
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
    optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], regularizer: SaliencyRegularizer | None = None
) -> Step:
    """Return a step on a loss, and on the penalty if there is a regularizer."""

    def backward() -> None:
        total = loss() if regularizer is None else loss() + regularizer()
        total.backward()  # type: ignore[no-untyped-call]

    return _step(optimizer, backward)


def _step(optimizer: torch.optim.Optimizer, backward: Callable[[], None]) -> Step:
    def step() -> None:
        optimizer.zero_grad()
        backward()
        optimizer.step()

    return step


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def _losses(outputs: Sequence[Tensor], labels: Tensor) -> list[Tensor]:
    return [functional.binary_cross_entropy_with_logits(z[:, 0], labels[:, t]) for t, z in enumerate(outputs)]


def _task_loss(outputs: Sequence[Tensor], labels: Tensor) -> Tensor:
    return torch.stack(_losses(outputs, labels)).sum()


def plain_step(model: nn.Module, images: Tensor, labels: Tensor, most: int | None) -> Step:
    """Equal weighting."""
    return training_step(_optimizer(model), lambda: _task_loss(model(images), labels))


def regularized_step(
    model: ManyHeads | DistributedDataParallel, images: Tensor, labels: Tensor, most: int | None, **options: Any
) -> Step:
    """The same with the two lines of this package, and its defaults."""
    optimizer = _optimizer(model)
    attachment = (model.module if isinstance(model, DistributedDataParallel) else model).attachment
    regularizer = SaliencyRegularizer(model, optimizer=optimizer, max_tasks_per_step=most, **attachment, **options)
    return training_step(optimizer, lambda: _task_loss(model(images), labels), regularizer)


def regularized_surgery_step(
    model: ManyHeads | DistributedDataParallel, images: Tensor, labels: Tensor, most: int | None, **options: Any
) -> Step:
    """The same with gradient surgery at the feature map."""
    return regularized_step(model, images, labels, most, surgery=PCGrad(), **options)


def surgery_step(model: ManyHeads, images: Tensor, labels: Tensor, most: int | None) -> Step:
    """Gradient surgery at the feature map, without the penalty."""
    FeatureSurgery(model, **model.attachment)
    return plain_step(model, images, labels, most)


def parameter_surgery_step(model: ManyHeads, images: Tensor, labels: Tensor, most: int | None) -> Step:
    """Gradient surgery on the backbone's parameters: a backward pass for each task."""
    optimizer = _optimizer(model)
    surgery = ParameterSurgery(model, PCGrad(), optimizer=optimizer)
    return _step(optimizer, lambda: surgery.backward(_losses(model(images), labels)))


def torchjd_step(model: ManyHeads, images: Tensor, labels: Tensor, most: int | None) -> Step:
    """The same by TorchJD, one task at a time, which is faster here than its vmap."""
    from torchjd import aggregation, autojac

    aggregator = aggregation.PCGrad()

    def backward() -> None:
        feature = model.backbone(images)
        losses = _losses([head(feature) for head in model.heads], labels)
        autojac.mtl_backward(losses, features=feature, parallel_chunk_size=1)
        autojac.jac_to_grad(list(model.backbone.parameters()), aggregator)

    return _step(_optimizer(model), backward)


def textbook_step(model: ManyHeads, images: Tensor, labels: Tensor, most: int | None) -> Step:
    """The same as it is written in the paper: one gradient vector after the other, projected pair by pair."""
    shared = list(model.backbone.parameters())

    def backward() -> None:
        vectors = []
        for loss, head in zip(_losses(model(images), labels), model.heads):
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

    return _step(_optimizer(model), backward)


def floor_step(model: ManyHeads, images: Tensor, labels: Tensor, most: int | None) -> Step:
    """The double backward through the heads alone: a penalty on the size of the saliencies, without pairs or relations."""
    aliases: list[Tensor] = []

    def fork(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        aliases.append(args[0].view_as(args[0]))
        return (aliases[-1],)

    chosen = list(model.heads)[:most]
    for head in chosen:
        head.register_forward_pre_hook(fork)

    def total(outputs: Sequence[Tensor]) -> Tensor:
        scalars = [output.sum() for output in outputs[: len(chosen)]]
        saliencies = torch.autograd.grad(scalars, aliases, create_graph=True)
        aliases.clear()
        return _task_loss(outputs, labels) + 1e-3 * torch.stack(saliencies).square().sum()

    return training_step(_optimizer(model), lambda: total(model(images)))


def loop_step(model: ManyHeads, images: Tensor, labels: Tensor, most: int | None) -> Step:
    """The published way: a gradient for each sample and task, and a loop over samples and pairs."""
    features: list[Tensor] = []
    model.backbone.register_forward_hook(lambda module, args, output: features.append(output))

    def total(outputs: Sequence[Tensor]) -> Tensor:
        feature = features.pop()
        penalty = feature.new_zeros(())
        weight = 2 / (len(outputs) * (len(outputs) - 1))
        for sample in feature.split(1):  # type: ignore[no-untyped-call]
            rows = [torch.autograd.grad(head(sample).sum(), sample, create_graph=True)[0] for head in model.heads]
            for i, row in enumerate(rows):
                for other in rows[:i]:
                    penalty = penalty + weight * (row - other).abs().sum()
        return _task_loss(outputs, labels) + 0.1 * penalty / len(feature)

    return training_step(_optimizer(model), lambda: total(model(images)))


STEPS: dict[str, Callable[..., Step]] = {
    "plain": plain_step,
    "regularizer": regularized_step,
    "floor": floor_step,
    "surgery": surgery_step,
    "regularizer_surgery": regularized_surgery_step,
    "parameters": parameter_surgery_step,
    "torchjd": torchjd_step,
    "textbook": textbook_step,
    "loop": loop_step,
}


def tasks_sampled(tasks: int, options: argparse.Namespace) -> int | None:
    """Return how many tasks the regularizer samples at each step; ``None``: it takes all."""
    most: int = options.max_tasks_per_step
    return most if tasks > most else None


def make_steps(
    names: Sequence[str], tasks: int, options: argparse.Namespace, variant: str | None = None
) -> dict[str, Step]:
    """Make steps of some kinds, each on a copy of one model, with the options of the overhead recipe.

    ``variant``: ``"linear"`` or ``"two-layer"``: one head with a column per task; ``"heads_alone"``: the heads on a fixed
    vector that requires grad, without a backbone.
    """
    torch.manual_seed(0)
    model = ManyHeads(tasks, options.width, None if variant == "heads_alone" else variant)
    images, labels = make_data(tasks, options.batch_size, options.size)
    if variant == "heads_alone":
        images = torch.randn(options.batch_size, 8 * options.width).requires_grad_()
        model.backbone = nn.Sequential()
    sampled = tasks_sampled(tasks, options)
    return {name: STEPS[name](copy.deepcopy(model), images, labels, sampled) for name in names}


def make_distributed_steps(tasks: int, options: argparse.Namespace, group: Any) -> dict[str, Step]:
    """Make the plain step and those with the regularizer, each on a ``DistributedDataParallel`` around a copy of one model.

    The collectives of the regularizer take place in ``group``. The steps whose names end in ``_local`` have none.
    """
    torch.manual_seed(0)
    model = ManyHeads(tasks, options.width)
    images, labels = make_data(tasks, options.batch_size, options.size)
    sampled = tasks_sampled(tasks, options)
    steps = {"plain": plain_step(DistributedDataParallel(copy.deepcopy(model)), images, labels, sampled)}
    for name in ("regularizer", "regularizer_surgery"):
        for suffix, chosen in (("_local", "local"), ("", group)):
            wrapped = DistributedDataParallel(copy.deepcopy(model))
            steps[name + suffix] = STEPS[name](wrapped, images, labels, sampled, process_group=chosen)
    return steps
