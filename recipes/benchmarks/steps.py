"""The training steps that the overhead recipe times, on a model of ResNet-18's shape."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from saliency_reg import FeatureSurgery, ParameterSurgery, PCGrad, SaliencyRegularizer

__all__ = ["STEPS", "ManyHeads", "Step", "make_data", "make_distributed_steps", "make_steps"]


class Block(nn.Module):
    """Two convolutions with a shortcut, as in ResNet-18."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(hidden)) + self.shortcut(x))


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
        stages: list[nn.Module] = [
            nn.Conv2d(3, width, 7, 2, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        ]
        channels = width
        for stage in range(4):
            outputs = width * 2**stage
            stages += [Block(channels, outputs, 1 if stage == 0 else 2), Block(outputs, outputs, 1)]
            channels = outputs
        self.backbone = nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        sizes = [1] * tasks if columns is None else [tasks]
        self.heads = nn.ModuleList(
            [
                nn.Linear(channels, size)
                if columns == "linear"
                else nn.Sequential(nn.Linear(channels, 128), nn.GELU(), nn.Linear(128, size))
                for size in sizes
            ]
        )

    @property
    def attachment(self) -> dict[str, Any]:
        """What tells the library where the tasks are."""
        if len(self.heads) == self.tasks:
            return {"heads": "heads"}
        return {"heads": "heads.0", "tasks": [str(task) for task in range(self.tasks)]}

    def forward(self, images: Tensor) -> list[Tensor]:
        feature = self.backbone(images)
        return [column for head in self.heads for column in head(feature).split(1, dim=1)]


class Step(Protocol):
    """One training step, from the forward to the optimizer."""

    def __call__(self) -> None: ...


def make_data(tasks: int, batch_size: int, size: int) -> tuple[Tensor, Tensor]:
    """Images ``[B, 3, size, size]`` and labels ``[B, T]``: the time of a step does not depend on what they show."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, size, size, generator=generator)
    return images, torch.randint(2, (batch_size, tasks), generator=generator).float()


def _losses(outputs: Sequence[Tensor], labels: Tensor) -> list[Tensor]:
    return [functional.binary_cross_entropy_with_logits(z[:, 0], labels[:, t]) for t, z in enumerate(outputs)]


def _task_loss(outputs: Sequence[Tensor], labels: Tensor) -> Tensor:
    return torch.stack(_losses(outputs, labels)).sum()


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def _stepping(optimizer: torch.optim.Optimizer, backward: Callable[[], None]) -> Step:
    def step() -> None:
        optimizer.zero_grad()
        backward()
        optimizer.step()

    return step


def _trainer(model: nn.Module, images: Tensor, total_loss: Callable[[Sequence[Tensor]], Tensor]) -> Step:
    return _stepping(_optimizer(model), lambda: total_loss(model(images)).backward())  # type: ignore[no-untyped-call]


def plain_step(model: ManyHeads, images: Tensor, labels: Tensor, most: int | None) -> Step:
    """Equal weighting."""
    return _trainer(model, images, lambda outputs: _task_loss(outputs, labels))


def regularized_step(model: ManyHeads, images: Tensor, labels: Tensor, most: int | None) -> Step:
    """The same with the two lines of this package, and its defaults."""
    return _with_regularizer(model, images, labels, max_tasks_per_step=most)


def regularized_surgery_step(model: ManyHeads, images: Tensor, labels: Tensor, most: int | None) -> Step:
    """The same with gradient surgery at the feature map."""
    return _with_regularizer(model, images, labels, max_tasks_per_step=most, surgery=PCGrad())


def _with_regularizer(
    model: ManyHeads | DistributedDataParallel, images: Tensor, labels: Tensor, **options: Any
) -> Step:
    optimizer = _optimizer(model)
    attachment = (model.module if isinstance(model, DistributedDataParallel) else model).attachment
    regularizer = SaliencyRegularizer(model, optimizer=optimizer, **attachment, **options)

    def backward() -> None:
        outputs = model(images)
        (_task_loss(outputs, labels) + regularizer()).backward()

    return _stepping(optimizer, backward)


def surgery_step(model: ManyHeads, images: Tensor, labels: Tensor, most: int | None) -> Step:
    """Gradient surgery at the feature map, without the penalty."""
    FeatureSurgery(model, **model.attachment)
    return plain_step(model, images, labels, most)


def parameter_surgery_step(model: ManyHeads, images: Tensor, labels: Tensor, most: int | None) -> Step:
    """Gradient surgery on the backbone's parameters: a backward pass for each task."""
    optimizer = _optimizer(model)
    surgery = ParameterSurgery(model, PCGrad(), optimizer=optimizer)
    return _stepping(optimizer, lambda: surgery.backward(_losses(model(images), labels)))


def torchjd_step(model: ManyHeads, images: Tensor, labels: Tensor, most: int | None) -> Step:
    """The same by TorchJD, one task at a time, which is faster here than its vmap."""
    from torchjd import aggregation, autojac

    aggregator = aggregation.PCGrad()

    def backward() -> None:
        feature = model.backbone(images)
        losses = _losses([head(feature) for head in model.heads], labels)
        autojac.mtl_backward(losses, features=feature, parallel_chunk_size=1)
        autojac.jac_to_grad(list(model.backbone.parameters()), aggregator)

    return _stepping(_optimizer(model), backward)


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

    return _stepping(_optimizer(model), backward)


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

    return _trainer(model, images, total)


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

    return _trainer(model, images, total)


STEPS: dict[str, Callable[[ManyHeads, Tensor, Tensor, int | None], Step]] = {
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


def make_steps(
    names: Sequence[str],
    tasks: int,
    batch_size: int,
    size: int,
    width: int,
    most: int | None,
    variant: str | None = None,
) -> dict[str, Step]:
    """Each on a copy of one model.

    ``variant``: ``"linear"`` or ``"two-layer"``: one head with a column per task; ``"heads_alone"``: the heads on a fixed
    vector that requires grad, without a backbone.
    """
    torch.manual_seed(0)
    model = ManyHeads(tasks, width, None if variant == "heads_alone" else variant)
    images, labels = make_data(tasks, batch_size, size)
    if variant == "heads_alone":
        images = torch.randn(batch_size, 8 * width).requires_grad_()
        model.backbone = nn.Sequential()
    return {name: STEPS[name](copy.deepcopy(model), images, labels, most) for name in names}


def make_distributed_steps(
    tasks: int, batch_size: int, size: int, width: int, most: int | None, group: Any
) -> dict[str, Step]:
    """The plain step and those with the regularizer, each on a ``DistributedDataParallel`` around a copy of one model.

    Args:
        group: for the collectives of the regularizer. The steps whose names end in ``_local`` have none.
    """
    torch.manual_seed(0)
    model = ManyHeads(tasks, width)
    images, labels = make_data(tasks, batch_size, size)

    def regularized(**options: Any) -> Step:
        wrapped = DistributedDataParallel(copy.deepcopy(model))
        return _with_regularizer(wrapped, images, labels, max_tasks_per_step=most, **options)

    return {
        "plain": _trainer(
            DistributedDataParallel(copy.deepcopy(model)), images, lambda outputs: _task_loss(outputs, labels)
        ),
        "regularizer_local": regularized(process_group="local"),
        "regularizer": regularized(process_group=group),
        "regularizer_surgery_local": regularized(process_group="local", surgery=PCGrad()),
        "regularizer_surgery": regularized(process_group=group, surgery=PCGrad()),
    }
