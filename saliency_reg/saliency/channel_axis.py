"""Where a feature map of three axes has its channels, if that was not said, and whether its samples come first.

Both by what made it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import ShapeError

_TAKES_SEVERAL = ("MulBack", "AddBack", "Sub", "Div")
#: Nodes of autograd that leave the axes as they are, by how their names begin; the last two are of this package.
_KEEPS_AXES = (
    *_TAKES_SEVERAL,
    *("Relu", "Gelu", "Silu", "Tanh", "Sigmoid", "LeakyRelu", "Elu", "Softplus", "Hard", "Mish", "Prelu", "Threshold"),
    *("Celu", "Rrelu", "LogSigmoid", "Pow", "Exp", "Sqrt", "Abs", "Sign", "Neg", "Clamp", "Glu", "MaskedFill"),
    *("MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool", "Upsample", "NativeLayerNorm", "NativeDropout"),
    *("Clone", "Alias", "ToCopy", "Slice", "Constant", "Cat", "_Fork", "_Req"),
)
_CHANNELS_SECOND = (
    "Convolution",
    "CudnnConv",
    "NativeGroupNorm",
    "NativeBatchNorm",
    "CudnnBatchNorm",
    "MiopenBatchNorm",
)
_CHANNELS_LAST = ("NativeLayerNorm", "AddmmBack", "MmBack", "EmbeddingBack")
_VIEWS = ("ViewBackward", "UnsafeView", "ReshapeAlias")
_MOST_NODES = 200
_SEQUENCE_FIRST = "saliency_reg: sequence first"
_ELEMENTWISE = (nn.Identity, nn.Dropout, nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.ELU)
_CONVOLUTIONS = (nn.Conv1d, nn.ConvTranspose1d)
_NORMS = (nn.BatchNorm1d, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.GroupNorm)


def channel_axis_by_origin(tensor: Tensor, made_by: nn.Module | None, head: nn.Module | None) -> int | None:
    """Return the channel axis of a map with three axes, batch first, where it can be known; else ``None``.

    ``made_by`` is the module that returned it, ``head`` one that reads it.
    """
    if tensor.ndim != 3:
        return None
    if head is not None and tensor.shape[1] != tensor.shape[2] == _first_in_features(head):
        return 2
    found = _by_graph(tensor)
    axis: int | None = found if isinstance(found, int) else None  # rows may have been transposed
    if axis is None and made_by is not None and _width(made_by, last=True) == tensor.shape[1]:
        axis = 1
    if axis is None and head is not None and tensor.shape[2] != tensor.shape[1] == _width(head, last=False):
        axis = 1
    return axis


def mark_sequence_first(output: Any) -> None:
    """Note, in the graph, that this came out of a recurrent layer whose first axis is the sequence."""
    node: Any = output.grad_fn if isinstance(output, Tensor) and output.ndim == 3 else None
    if node is not None:
        node.metadata[_SEQUENCE_FIRST] = True


def check_batch_first(tensor: Tensor) -> None:
    """Refuse a map that has the sequence of such a layer on its first axis."""
    for node, axes in _origins(tensor):
        if _SEQUENCE_FIRST in node.metadata:
            if axes[0] == 0:
                raise ShapeError(
                    f"the feature map {list(tensor.shape)} comes out of a recurrent layer with batch_first=False, so that "
                    "its first axis is the sequence. Pass batch_axis=1, or build the layer with batch_first=True if the "
                    "first axis of your data is the batch."
                )
            return


def _by_graph(tensor: Tensor) -> Any:
    linear: set[Any] = set()  # a Linear may go over the positions, too
    for node, axes in _origins(tensor):
        name = node.name()
        if name.startswith(_CHANNELS_SECOND):
            return axes[1]
        if name.startswith(_CHANNELS_LAST) and len(getattr(node, "_saved_normalized_shape", (0,))) == 1:
            if name.startswith("NativeLayerNorm"):
                return axes[-1]
            linear.add(axes[-1])
        behind = node.next_functions[0][0] if node.next_functions else None
        if name.startswith(_VIEWS) and behind is not None and "BatchNorm" in behind.name():
            return axes[1]  # an InstanceNorm's
    return linear.pop() if len(linear) == 1 else None


def _origins(tensor: Tensor) -> Iterator[tuple[Any, list[Any]]]:
    """Yield the nodes behind a map, each with the axes of the map that those of its output became."""
    waiting: deque[tuple[Any, list[Any]]] = deque([(tensor.grad_fn, [0, 1, 2])])
    for _ in range(_MOST_NODES):
        if not waiting:
            break
        node, axes = waiting.popleft()
        if node is None:
            continue
        yield node, axes
        before = _axes_before(node, axes, tensor.shape)
        if before is not None:
            several = node.name().startswith(_TAKES_SEVERAL)
            waiting += [
                (edge[0], before) for edge in node.next_functions if not (several and _is_broadcast(node, edge))
            ]


def _is_broadcast(node: Any, edge: Any) -> bool:
    """Whether an operation took a tensor of another shape than the one that it made, such as a gate or a position."""
    made, taken = (getattr(one, "_input_metadata", None) for one in (node, edge[0]))
    return made is not None and taken is not None and list(made[0].shape) != list(taken[edge[1]].shape)


def _axes_before(node: Any, axes: list[Any], shape: Sequence[int]) -> list[Any] | None:
    """Return the axes of what a node was given; ``None`` where they cannot be followed."""
    name = node.name()
    if name.startswith(_KEEPS_AXES):
        return axes
    if name.startswith("Transpose"):
        one, other = (_signed(dim) % len(axes) for dim in (node._saved_dim0, node._saved_dim1))
        before = list(axes)
        before[one], before[other] = axes[other], axes[one]
        return before
    if name.startswith("Permute"):
        before = list(axes)
        for place, dim in enumerate(node._saved_dims):
            before[_signed(dim) % len(axes)] = axes[place]
        return before
    if name.startswith("Unsqueeze"):
        dim = _signed(node._saved_dim) % len(axes)
        return axes[:dim] + axes[dim + 1 :]
    if name.startswith("Squeeze") and hasattr(node, "_saved_dim") and isinstance(node._saved_dim, int):
        dim = _signed(node._saved_dim) % (len(axes) + 1)
        return [*axes[:dim], None, *axes[dim:]]
    if name.startswith(("AddmmBack", "MmBack")):
        return [axes[0], None]
    if name.startswith(_VIEWS):
        sizes = list(node._saved_self_sym_sizes)
        if any(isinstance(axis, tuple) for axis in axes):  # rows, which were samples and positions
            rows = axes[0] if isinstance(axes[0], tuple) else ()
            return [*rows, axes[1]] if rows and sizes[:-1] == [shape[axis] for axis in rows] else None
        if [None if axis is None else shape[axis] for axis in axes] == sizes:
            return axes
        if len(sizes) == 2 and axes[-1] is not None and sizes[1] == shape[axes[-1]]:  # rows of a Linear
            return [tuple(axes[:-1]) if None not in axes[:-1] else None, axes[-1]]
        if axes[:2] == [0, 1] and sizes[:2] == list(shape[:2]):  # positions were joined, as by flatten(2)
            return [0, 1, *[None] * (len(sizes) - 2)]
    return None


def _signed(dim: int) -> int:
    return dim - 2**64 if dim >= 2**63 else dim


def _first_in_features(module: nn.Module) -> int | None:
    """Return the inputs of the first layer with weights, if it is a Linear and it is sure which one runs first."""
    while children := list(module.children()):
        if len(children) > 1 and not isinstance(module, nn.Sequential):
            return None
        module = next((layer for layer in children if not isinstance(layer, _ELEMENTWISE)), nn.Identity())
    return module.in_features if isinstance(module, nn.Linear) else None


def _width(module: nn.Module, *, last: bool) -> int | None:
    """Return the channels that the last layer with channels on axis 1 makes, or the first one reads."""
    layers = [layer for layer in module.modules() if next(layer.children(), None) is None]
    for layer in reversed(layers) if last else layers:
        if isinstance(layer, _CONVOLUTIONS):
            return layer.out_channels if last else layer.in_channels
        if isinstance(layer, _NORMS):
            return layer.num_channels if isinstance(layer, nn.GroupNorm) else layer.num_features
        if next(layer.parameters(), None) is not None or isinstance(layer, nn.LayerNorm):
            return None
    return None
