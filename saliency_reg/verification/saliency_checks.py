"""Rows ``saliency`` and ``samples``: each sample's gradient is its own, and no sample changes the outputs of another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..capture import CapturedForward, as_edge
from ..saliency import Pooling, batch_first
from ..torch_tools import added, gradients_of
from .culprits import changed_elsewhere, first_moved, mixing_parts, watched_run
from .report import Check
from .subject import Handed, HeldStatistics, Run, Subject

#: So many samples, and tasks, are differentiated one by one.
_MOST_SAMPLES, _MOST_TASKS = 3, 12


def handed(subject: Subject, tensors: Sequence[Tensor]) -> Handed:
    """Give the heads these feature maps; a copy, as heads may work on it in place."""
    copies: dict[int, Tensor] = {}
    named = bool(subject.capture.feature_names)

    def copy_of(index: int, _: Tensor) -> Tensor:
        place = index if named else 0
        if place not in copies:
            copies[place] = tensors[place].clone()
        return copies[place]

    return Handed(subject.heads, named, copy_of)


def maps_of(subject: Subject) -> list[Tensor]:
    """Return the values of the feature maps of a forward, before anything changed them in place."""
    maps: dict[int, Tensor] = {}

    def note(index: int, feature: Tensor) -> None:
        maps[index] = feature.detach().clone()

    named = bool(subject.capture.feature_names)
    subject.run(Handed(subject.heads, named, note))
    return [maps[index] for index in sorted(maps)] if named else [next(iter(maps.values()))]


def saliency(subject: Subject, tolerance: float | None) -> Check:
    """Differentiate the outputs of single samples at a feature map that is a leaf, and compare."""
    run = subject.run()
    mask = subject.given_for(run).mask
    masks = [one for one in (mask if isinstance(mask, Sequence) else [mask]) if one is not None]
    if masks and not any(bool(one.any()) for one in masks):
        return Check("saliency", False, "the mask leaves out every position (it is False everywhere)", _MASK)
    found = subject.saliencies(run, create_graph=True)
    missing = [subject.tasks[task] for task in run.forward.tasks(len(subject.tasks)) if task not in found.present]
    if not found.present:
        return Check(
            "saliency", False, f"no task has a saliency: {', '.join(map(repr, missing))}", "Choose scalarize=."
        )
    held = HeldStatistics() if subject.options.cross_sample == "fix" else None
    leaves = [values.requires_grad_() for values in maps_of(subject)] if subject.replaceable else None
    alone = subject.run(handed(subject, leaves) if leaves else None, statistics=held)
    size = found.batch_size
    chosen, tasks = sorted({*range(min(_MOST_SAMPLES - 1, size)), size - 1}), found.present[:_MOST_TASKS]
    worst, which, scale = 0.0, "", 0.0
    for sample in chosen:
        for row, reference in enumerate(_of_sample(subject, alone, leaves, sample, tasks)):
            values = found.values[row, min(sample, found.values.shape[1] - 1)].flatten().double()
            difference = float((values - reference.double()).abs().max())
            scale = max(scale, float(reference.abs().max()))
            if difference >= worst:
                worst, which = difference, f"task {subject.tasks[tasks[row]]!r}, sample {sample}"
    dtypes = [run.forward.features[0].tensor.dtype, *(output.dtype for output in run.forward.outputs)]
    allowed = tolerance or 1e3 * max(torch.finfo(dtype).eps for dtype in dtypes)
    share = worst / scale if scale else worst
    some = f"{len(chosen)} sample{'s' * (len(chosen) > 1)}"
    text = f"largest difference from the gradients of {some} alone: {share:.1e} of the largest entry"
    if missing:
        return Check("saliency", False, f"{text}; zero, or nothing but rounding, for {missing}", _NOTHING)
    if share <= allowed:
        return Check("saliency", True, text)
    return Check("saliency", False, f"{text} ({which}), allowed {allowed:.1e}", _DIFFERS)


_MASK = "Pass a mask that is True where positions count, e.g. mask=~padding."
_NOTHING = (
    "They are not compared with others. Pass scalarize='sum' where outputs are no classes, or output= for the logits."
)
_DIFFERS = (
    "Look at the row 'samples' first. Code that runs differently each time (own random numbers, counters) does it, too."
)


def _of_sample(
    subject: Subject, alone: Run, leaves: Sequence[Tensor] | None, sample: int, tasks: Sequence[int]
) -> list[Tensor]:
    """Return the gradient of one sample's scalars at its own feature map, pooled: ``[C]`` for each task."""
    forward = replace(alone.forward, features=[replace(feature) for feature in alone.forward.features])
    batch_first(forward, subject.options.batch_axis)
    extractor, targets = alone.twin._extractor, subject.given.get("targets")
    mask = subject.given_for(alone).mask
    masks = mask if isinstance(mask, (list, tuple)) else [mask] * len(forward.features)
    poolings = [
        Pooling(feature.tensor.shape, subject.channel_axis(alone, index), subject.options.pool, one, feature.batch_axis)
        for index, (feature, one) in enumerate(zip(forward.features, masks))
    ]
    chosen, shape = set(tasks), poolings[0].shape
    if subject.options.target == "loss":
        scalars = extractor._of_losses(subject.given_for(alone).losses, forward, shape[0], chosen)
    else:
        own = slice(sample, sample + 1)
        outputs = [output[own] if output.ndim and len(output) == shape[0] else output for output in forward.outputs]
        pairs = () if targets is None else (targets.items() if isinstance(targets, dict) else enumerate(targets))
        labels = {subject.tasks.index(k) if isinstance(k, str) else k: label[own] for k, label in pairs}
        of_one = torch.Size([outputs[0].shape[0] if outputs[0].ndim else 1, *shape[1:]])
        scalars = extractor._of_outputs(
            replace(forward, outputs=outputs), of_one, poolings[0].channel_axis, labels, chosen
        )
    rows = []
    for task in tasks:
        gradients = _at_maps(scalars[task], forward, leaves)
        parts = [
            _pooled(gradient, feature.batch_axis, sample, pooling, one)
            for gradient, feature, pooling, one in zip(gradients, forward.features, poolings, masks)
        ]
        rows.append(torch.cat(parts))
    return rows


def _at_maps(scalar: Tensor, forward: CapturedForward, leaves: Sequence[Tensor] | None) -> list[Tensor]:
    """Return its gradient at each feature map: our own, or, where they cannot be replaced, those of the forward."""
    if leaves is not None:
        found = gradients_of([scalar], list(leaves))
        return [torch.zeros_like(leaf) if one is None else one for leaf, one in zip(leaves, found)]
    rows = []
    for feature in forward.features:
        at_edges = gradients_of([scalar], list({as_edge(edge): edge for edge in feature.edges}.values()))
        total = added(*[feature.gradient(each) for each in at_edges])
        rows.append(torch.zeros_like(feature.tensor) if total is None else total)
    return rows


def _pooled(gradient: Tensor, batch_axis: int, sample: int, pooling: Pooling, mask: Tensor | None) -> Tensor:
    own = gradient.select(batch_axis, sample)
    by_channel = own.movedim(pooling.channel_axis - 1, 0)  # [C, positions...]
    keep = torch.ones_like(by_channel[0]) if mask is None else (mask[sample] != 0).expand(by_channel.shape[1:])
    by_channel = torch.where(keep != 0, by_channel, torch.zeros_like(by_channel))
    if pooling._pool is None:
        return by_channel.movedim(0, pooling.channel_axis - 1).flatten()
    total = by_channel.flatten(1).sum(1) if by_channel.ndim > 1 else by_channel
    return total / keep.sum().clamp(min=1) if pooling._pool == "mean" else total


def samples(subject: Subject) -> Check:
    """Replace the feature map of one sample, and look at the outputs of the others."""
    run, parts = watched_run(subject)
    feature = run.forward.features[0]
    batch_first(run.forward, subject.options.batch_axis)
    axis = feature.batch_axis
    if feature.tensor.shape[axis] < 2:
        return Check("samples", None, "not checked: the batch has one sample", "Pass a batch of two or more.")
    if not subject.replaceable:
        return Check("samples", None, _NOT_REPLACED)
    if not _mix(subject, axis):
        return Check(
            "samples", True, "the outputs of the other samples stay as they are if one sample's feature map changes"
        )
    guilty = mixing_parts(subject, parts, feature.tensor.shape[axis])
    names = ", ".join(map(str, guilty[:6])) or "code that is in no module of its own"
    if _mix(subject, axis, HeldStatistics()):
        return Check(
            "samples", False, f"outputs of other samples change with one sample's feature map: {names}", _MIXES
        )
    if subject.options.cross_sample == "fix":
        text = f"the statistics of the batch are held constant in the saliency, which mix samples: {names}"
        return Check("samples", True, text)
    text = f"batch statistics mix samples, so that the saliency of a sample is not its own: {names}"
    return Check(
        "samples", False, text, "Pass cross_sample='fix', use LayerNorm or GroupNorm, or put them in eval mode."
    )


_NOT_REPLACED = (
    "not checked: the feature map cannot be replaced (the input of a module, or one of several that make each other)"
)
_MIXES = "Choose a feature map behind it, or normalise within each sample (LayerNorm, GroupNorm)."


def _mix(subject: Subject, axis: int, statistics: HeldStatistics | None = None) -> bool:
    maps = maps_of(subject)
    moved = [first_moved(values, axis) for values in maps]
    before, after = (_outputs(subject, tensors, statistics) for tensors in (maps, moved))
    size = maps[0].shape[axis]
    pairs = [(x, y) for x, y in zip(before, after) if x.ndim and len(x) == size]
    return any(changed_elsewhere(x, y) for x, y in pairs)


def _outputs(subject: Subject, maps: Sequence[Tensor], statistics: HeldStatistics | None) -> list[Tensor]:
    leaves = [values.detach().clone().requires_grad_() for values in maps]
    run = subject.run(handed(subject, leaves), statistics=statistics)
    batch_first(run.forward, subject.options.batch_axis)
    return [output.detach() for output in run.forward.outputs]
