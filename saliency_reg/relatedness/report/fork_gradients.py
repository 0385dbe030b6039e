"""Gradients of the task losses at the feature map that the heads share, before any surgery; the backbone is not passed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ...capture import CapturedForward, is_product
from ...errors import CaptureError
from ...surgery import column_gramian, gramian_over
from ...torch_tools import (
    Edge,
    Gradient,
    at_least_float32,
    gradients_of,
    matmul_is_reduced,
    state_dtype,
    without_autocast,
)
from .layout import OutputLayout
from .reruns import Reruns


class ForkGradients(Protocol):
    """Of the summed loss of each task, in this process."""

    def gramian(self) -> Tensor:
        """Return ``[T, T]`` inner products; zeros for tasks that did not run."""

    def size(self) -> Tensor:
        """Return the squared length of the feature map, 0-dim."""

    def outputs_after(self, steps: Tensor) -> dict[int, Tensor]:
        """Return ``[1 + T, B, ...]`` outputs of each task: as it is, and after ``A - steps[j] dL_j/dA`` for each task j.

        Tasks whose head cannot be run again are missing.
        """


class ForkReader:
    """Takes them of each forward; remembers whether heads read each other."""

    def __init__(self, tasks: Sequence[str], reruns: Reruns) -> None:
        self._tasks = tasks
        self._reruns = reruns
        self._apart: dict[tuple[int, ...], bool] = {}

    def read(self, forward: CapturedForward, layout: OutputLayout, slopes: Mapping[int, Tensor]) -> ForkGradients:
        """Return the gradients; in closed form for ``Linear`` heads on a vector."""
        if (weight := _weights(forward)) is not None:
            return _OfLinearHeads(forward, layout, slopes, weight, len(self._tasks))
        size = len(self._tasks)
        found: list[list[Gradient]] = [[None] * size for _ in forward.features]
        if layout.columns is not None:
            for task in layout.present:
                seeds = layout.per_head(slopes, task)
                self._take(
                    found, forward, [task], forward.outputs, [feature.edges[:1] for feature in forward.features], seeds
                )
            return _OfAnyHeads(forward, layout, found, self._reruns)
        seeds = layout.per_head(slopes)
        if self._are_apart(forward):
            edges = [list(feature.edges) for feature in forward.features]
            self._take(found, forward, layout.present, forward.outputs, edges, seeds)
            return _OfAnyHeads(forward, layout, found, self._reruns)
        for row, task in enumerate(layout.present):
            # A head that reads others' outputs also comes to the feature map through them.
            edges = [list(feature.edges) if feature.separate else [feature.edges[row]] for feature in forward.features]
            self._take(found, forward, [task], forward.outputs[row : row + 1], edges, seeds[row : row + 1])
        return _OfAnyHeads(forward, layout, found, self._reruns)

    def _take(
        self,
        found: list[list[Gradient]],
        forward: CapturedForward,
        tasks: Sequence[int],
        outputs: Sequence[Tensor],
        edges: Sequence[Sequence[Edge]],
        seeds: Sequence[Tensor],
    ) -> None:
        """Fill in the gradients of some tasks by one call; of a single task those at all its edges are added up."""
        flat = [edge for own in edges for edge in own]
        gradients = iter(_taken(outputs, flat, seeds))
        for place, (feature, own) in enumerate(zip(forward.features, edges)):
            parts = [feature.gradient(next(gradients)) for _ in own]
            if len(tasks) > 1:
                for task, part in zip(tasks, parts):
                    found[place][task] = part
            else:
                known = [part for part in parts if part is not None]
                found[place][tasks[0]] = sum(known[1:], start=known[0]) if known else None

    def _are_apart(self, forward: CapturedForward) -> bool:
        """Whether each head reads an alias of its own and none comes to that of another; looked at once for each set."""
        if not all(feature.separate for feature in forward.features):
            return False
        key = tuple(forward.ran)
        if key not in self._apart:
            edges = [edge for feature in forward.features for edge in feature.edges]
            heads = len(forward.ran)
            self._apart[key] = all(
                gradient is None or place % heads == row
                for row, output in enumerate(forward.outputs)
                for place, gradient in enumerate(_taken([output], edges, [torch.ones_like(output)]))
            )
        return self._apart[key]


class _OfAnyHeads:
    def __init__(
        self, forward: CapturedForward, layout: OutputLayout, gradients: list[list[Gradient]], reruns: Reruns
    ) -> None:
        self._forward, self._layout, self._gradients, self._reruns = forward, layout, gradients, reruns

    def gramian(self) -> Tensor:
        return gramian_over(self._gradients, len(self._gradients[0]), self._forward.device)

    def size(self) -> Tensor:
        maps = [feature.tensor.detach() for feature in self._forward.features]
        return torch.stack([_squared_length(each).to(self._forward.device) for each in maps]).sum()

    def outputs_after(self, steps: Tensor) -> dict[int, Tensor]:
        maps = [feature.tensor.detach() for feature in self._forward.features]
        maps = [each.to(at_least_float32(each.dtype)) for each in maps]

        def block(number: int) -> list[Tensor]:
            """Return the feature maps after the step of a task, as they are for number 0."""
            own = [gradients[number - 1] for gradients in self._gradients] if number else [None] * len(maps)
            return [
                each if gradient is None else each - steps[number - 1].to(each) * gradient.to(each)
                for each, gradient in zip(maps, own)
            ]

        returned = self._reruns.of_blocks(self._forward, block, 1 + len(steps))
        layout = self._layout
        if layout.columns is not None:
            if returned[0] is None:
                return {}
            flat = layout.per_task([returned[0].flatten(0, 1)])
            return {task: one.reshape(1 + len(steps), -1, *one.shape[1:]) for task, one in flat.items()}
        found = {}
        for task, one in zip(layout.present, returned):
            if one is not None:
                output = one.to(at_least_float32(one.dtype))
                found[task] = output.flatten(1) if output[0, 0].numel() == 1 else output.flatten(2)
        return found


class _OfLinearHeads:
    """``dL_t/dA = g_t W_t`` for logits ``A W' + b``: after a step they are ``o - s g_t W_t W'``, and no map is needed."""

    def __init__(
        self, forward: CapturedForward, layout: OutputLayout, slopes: Mapping[int, Tensor], weight: Tensor, tasks: int
    ) -> None:
        self._forward, self._layout = forward, layout
        dtype = state_dtype(forward.device) if matmul_is_reduced() else at_least_float32(weight.dtype)
        seeds = layout.per_head(slopes)
        outputs = [
            output.detach().flatten(1) if output.ndim > 1 else output.detach().unsqueeze(1)
            for output in forward.outputs
        ]
        self._logits = torch.cat(outputs, 1).to(dtype)  # [B, C]
        self._slopes = torch.cat([seed.view(output.shape) for seed, output in zip(seeds, outputs)], 1).to(dtype)
        with without_autocast(weight):
            self._products = weight.to(dtype) @ weight.to(dtype).T  # [C, C]
        if layout.columns is not None:
            own = {task: list(layout.columns.of_task[task]) for task in layout.present}
        else:
            ends = torch.tensor([output.shape[1] for output in outputs]).cumsum(0).tolist()
            own = {
                task: list(range(end - output.shape[1], end))
                for task, end, output in zip(layout.present, ends, outputs)
            }
        self._owners = torch.zeros(tasks, len(weight), dtype=dtype, device=weight.device)
        for task, columns in own.items():
            self._owners[task, columns] = 1

    def gramian(self) -> Tensor:
        products = column_gramian(self._slopes) * self._products
        owners = self._owners.to(products.dtype)
        return owners @ products @ owners.T

    def size(self) -> Tensor:
        return _squared_length(self._forward.features[0].tensor.detach())

    def outputs_after(self, steps: Tensor) -> dict[int, Tensor]:
        layout, own = self._layout, self._owners.unsqueeze(1) * self._slopes  # [T, B, C]
        with without_autocast(own):
            changes = steps.to(own).view(-1, 1, 1) * (own @ self._products)
        logits = torch.cat([self._logits.unsqueeze(0), self._logits - changes])  # [1 + T, B, C]
        if layout.columns is not None:
            returned = [logits.flatten(0, 1)]
        else:
            widths = [output.numel() // len(output) for output in self._forward.outputs]
            returned = [part.flatten(0, 1) for part in torch.split(logits, widths, 2)]
        return {task: one.reshape(*logits.shape[:2], *one.shape[1:]) for task, one in layout.per_task(returned).items()}


def _weights(forward: CapturedForward) -> Tensor | None:
    """Return ``[C, D]``, the weights of all heads, if they are plain ``Linear`` layers that read the same vector."""
    if len(forward.features) != 1 or not forward.modules or forward.batch_size == 0:
        return None
    (feature,) = forward.features
    if not feature.direct or feature.tensor.ndim != 2 or feature.batch_axis != 0:
        return None
    heads = [forward.modules[index] for index in forward.ran]
    runs = zip(heads, forward.weights, forward.outputs, feature.edges)
    if not all(is_product(head, weight, output, edge) for head, weight, output, edge in runs):
        return None
    return torch.cat([head.get_parameter("weight").detach() for head in heads])


def _squared_length(tensor: Tensor) -> Tensor:
    return tensor.to(at_least_float32(tensor.dtype)).square().sum(dtype=state_dtype(tensor.device))


def _taken(outputs: Sequence[Tensor], edges: Sequence[Edge], seeds: Sequence[Tensor]) -> tuple[Gradient, ...]:
    try:
        with without_autocast(outputs[0]):
            return gradients_of(outputs, edges, seeds)
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error) and "inplace operation" not in str(error):
            raise
        raise CaptureError(
            "the graph of the outputs is gone: a backward pass has freed it, or an optimizer has changed the weights. Call "
            "report.update(labels) between the model's forward and loss.backward(), before or after the regularizer."
        ) from error
