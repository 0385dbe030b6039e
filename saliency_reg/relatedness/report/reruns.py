"""Heads run once more, on other feature maps, beside the training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ...capture import CapturedForward, FeatureMap, HeadCall, is_plainly, tensors_in
from ...torch_tools import gradients_of, warn_user

#: Entries of a feature map that are stacked at a time.
_STACKED = 2**22
_TOGETHER, _ONE_BY_ONE, _NOT_AT_ALL = "together", "one by one", "not at all"


class Reruns:
    """Knows of each head how it can be run again, which is found on the feature map of the forward itself.

    Heads that treat each sample alone are run on several feature maps at once. Those that do not (BatchNorm in train mode),
    or draw random numbers (dropout), are run on each. One that does not return its output again is left out, and told once.
    """

    def __init__(self, names: Sequence[str], named: bool) -> None:
        self._names = names
        self._named = named  # whether the feature map was named, and need not be what the heads read
        self._ways: dict[tuple[int, bool], str] = {}
        self._told = False

    def of_blocks(
        self, forward: CapturedForward, block: Callable[[int], list[Tensor]], number: int
    ) -> list[Tensor | None]:
        """Return ``[number, B, ...]`` for each head that ran: its output on each of the blocks of feature maps.

        Block 0 is the feature map as it is.
        """
        ways = [self._way(row, forward, block(0)) for row in range(len(forward.ran))]
        self._tell(forward, ways)
        parts: list[list[Tensor]] = [[] for _ in ways]
        most = max(1, _STACKED // max(1, sum(each.numel() for each in block(0))))
        for start in range(0, number, most):
            blocks = [block(each) for each in range(start, min(start + most, number))]
            whole = [torch.cat(maps) for maps in zip(*blocks)]
            versions = [each._version for each in whole]
            for row, way in enumerate(ways):
                call = forward.calls[row]
                if call is None or way == _NOT_AT_ALL:
                    continue
                if way == _TOGETHER:
                    if versions != [each._version for each in whole]:  # by a head that works in place
                        whole = [torch.cat(maps) for maps in zip(*blocks)]
                        versions = [each._version for each in whole]
                    parts[row].append(_apart(self._run(call, forward, whole), len(blocks)))
                else:
                    parts[row] += [
                        self._run(call, forward, [each.clone() for each in one]).unsqueeze(0) for one in blocks
                    ]
        return [torch.cat(own) if own else None for own in parts]

    def _run(self, call: HeadCall, forward: CapturedForward, maps: Sequence[Tensor]) -> Tensor:
        replaced = [(feature.tensor, new) for feature, new in zip(forward.features, maps)]
        if not self._named and call.source is not None:
            replaced.append((call.source, maps[0]))  # heads may each have a copy
        found: Tensor = call.again(replaced)
        return found

    def _way(self, row: int, forward: CapturedForward, maps: list[Tensor]) -> str:
        call = forward.calls[row] if forward.calls else None
        if call is None:
            return _NOT_AT_ALL
        key = forward.ran[row], call.module.training
        if key not in self._ways:
            self._ways[key] = self._found(call, forward, maps, forward.outputs[row].detach())
        return self._ways[key]

    def _found(self, call: HeadCall, forward: CapturedForward, maps: list[Tensor], output: Tensor) -> str:
        if self._named and not any(call.reads(feature.tensor) for feature in forward.features):
            return _NOT_AT_ALL
        if _reads_what_comes_of_it(call, forward):
            return _NOT_AT_ALL
        if not self._is_output(call, forward, [each.clone() for each in maps], output, 1):
            return _NOT_AT_ALL
        # In the middle, what would move the statistics of a batch; at the end, what would meet other random numbers.
        three = [torch.cat([each, 0.5 * each, each]) for each in maps]
        return _TOGETHER if self._is_output(call, forward, three, output, 3) else _ONE_BY_ONE

    def _is_output(
        self, call: HeadCall, forward: CapturedForward, maps: Sequence[Tensor], output: Tensor, times: int
    ) -> bool:
        try:
            found = self._run(call, forward, maps)
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError):
            return False
        if not isinstance(found, Tensor) or found.shape != (times * output.shape[0], *output.shape[1:]):
            return False
        dtype = torch.bfloat16 if call.reduced else output.dtype
        precise = torch.promote_types(found.dtype, output.dtype)
        output = output.to(precise)
        allowed = torch.finfo(dtype).eps ** 0.5 * output.abs().amax() if output.numel() else 0.0
        ends = (_apart(found.to(precise), times)[each] for each in {0, times - 1})
        return all(bool(((end - output).abs() <= allowed).all()) for end in ends)

    def _tell(self, forward: CapturedForward, ways: Sequence[str]) -> None:
        lost = [self._names[forward.ran[row]] for row, way in enumerate(ways) if way == _NOT_AT_ALL]
        if lost and not self._told:
            self._told = True
            warn_user(
                f"the heads {lost[:6]} do not return their outputs again when they are run once more on the feature map, so "
                "that the view 'tag' is NaN for what happens to them. Name as feature= what the heads are called with, and "
                "as heads= modules whose output is that of the task; heads that read outputs of others, and state beside "
                "buffers and random numbers, are not followed. To leave this view out, pass views=[...] without it."
            )


def _apart(rows: Tensor, blocks: int) -> Tensor:
    """Return ``[blocks, B, ...]`` of ``[blocks * B, ...]``."""
    return rows.reshape(blocks, len(rows) // blocks, *rows.shape[1:])


def _reads_what_comes_of_it(call: HeadCall, forward: CapturedForward) -> bool:
    """Whether a head is also called with what is made of the feature map (by another head), which would stay as it is."""
    others = [
        tensor
        for _, tensor in tensors_in(call.args, call.kwargs)
        if tensor.requires_grad and tensor is not call.source and not any(map(partial(_is, tensor), forward.features))
    ]
    edges = [edge for feature in forward.features for edge in feature.edges]
    found = gradients_of(others, edges, [torch.ones_like(each) for each in others]) if others else ()
    return any(gradient is not None for gradient in found)


def _is(tensor: Tensor, feature: FeatureMap) -> bool:
    return tensor is feature.tensor or is_plainly(tensor, feature.tensor)
