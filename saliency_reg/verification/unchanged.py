"""The model, the regularizer and the random numbers are afterwards what they were."""

from __future__ import annotations

import contextlib
import copy
import logging
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..capture import FeatureCapture
from ..distributed import Ranks
from ..regularizer import SaliencyRegularizer

logger = logging.getLogger("saliency_reg")


class Randomness:
    """The random states of Python, NumPy and torch, to begin from again and again."""

    def __init__(self, devices: list[torch.device]) -> None:
        self._python = random.getstate()
        numpy = sys.modules.get("numpy")
        self._numpy: Any = None if numpy is None else numpy.random.get_state()
        self._cpu = torch.get_rng_state()
        self._cuda = {device: torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"}

    def again(self) -> None:
        """Put them back."""
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)


class Buffers:
    """The buffers of a model as they are now: running statistics, counts, power iterations."""

    def __init__(self, model: nn.Module) -> None:
        self._own = [(module, dict(module._buffers)) for module in model.modules()]
        tensors = {id(one): one for _, own in self._own for one in own.values() if one is not None and not one.is_meta}
        self._values = [(tensor, tensor.detach().clone()) for tensor in tensors.values()]

    def lend(self) -> None:
        """Put copies in their places."""
        copies = {id(tensor): value.clone() for tensor, value in self._values}
        for module, own in self._own:
            module._buffers.update({name: copies.get(id(one), one) for name, one in own.items()})

    def again(self) -> None:
        """Put the buffers themselves, with their values, back."""
        for module, own in self._own:
            module._buffers.clear()
            module._buffers.update(own)
        for tensor, value in self._values:
            if not torch.equal(tensor, value):
                tensor.data.copy_(value)  # graphs of earlier forwards stay usable


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Put attributes, modes, buffers, gradients and random states of a model back at the end."""
    devices = list({parameter.device for parameter in model.parameters()})
    randomness, buffers = Randomness(devices), Buffers(model)
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    # Also what is in them, one level deep: weights that an RNN lists, and what a forward appends.
    contents = [
        (value, copy.copy(value))
        for _, own in attributes
        for value in own.values()
        if isinstance(value, (list, dict, set)) and type(value).__module__ in ("builtins", "collections")
    ]
    parameters = [(one, one.grad, one.requires_grad) for one in model.parameters()]
    silent = logger.disabled
    logger.disabled = True
    try:
        buffers.lend()
        yield
    finally:
        logger.disabled = silent
        for module, own in attributes:
            vars(module).clear()
            vars(module).update(own)
        for value, before in contents:
            value.clear()
            value.extend(before) if isinstance(value, list) else value.update(before)
        buffers.again()
        for parameter, gradient, requires_grad in parameters:
            parameter.grad = gradient
            parameter.requires_grad_(requires_grad)
        randomness.again()


@contextlib.contextmanager
def lent(surgery: Any, **state: Any) -> Iterator[None]:
    """Let the user's loop use a surgery, from this state on and in this process alone; ``None`` for none."""
    if surgery is None:
        yield
        return
    with unchanged(surgery):
        surgery.ranks = Ranks("local")
        for name, value in state.items():
            setattr(surgery, name, value)
        yield


@contextlib.contextmanager
def borrowed(regularizer: SaliencyRegularizer) -> Iterator[FeatureCapture]:
    """Lend the hooks of an attached regularizer, which then remembers nothing of what ran in between."""
    capture = regularizer._capture
    assert capture is not None
    before, reminded = dict(vars(capture)), regularizer._reminders.enabled
    held = vars(capture)
    held["_raw_inputs"] = inputs = copy.copy(capture._raw_inputs)
    vars(inputs).update(_seen={}, _told=set(inputs._told), _ran=set(inputs._ran))
    held["_ways"] = copy.deepcopy(capture._ways)
    held["_changes_output"] = dict(capture._changes_output)
    held.update(_latest=None, enabled=True)
    regularizer._reminders.enabled = False
    try:
        yield capture
    finally:
        regularizer._reminders.enabled = reminded
        held.clear()
        held.update(before)
