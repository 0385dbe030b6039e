"""Which parameters the task losses share, and which graphs surgery on parameters cannot work with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Union

from torch import Tensor, nn
from torch.autograd.graph import Node

from ...capture import find_module
from ...errors import ConfigurationError, NotConnectedError, WrongTypeError
from ...tasks import first_few
from ...torch_tools import DDP_SINK, derives_from

#: A module, its name, a parameter, or several of these.
ParameterChoice = Union[str, nn.Module, Tensor, Iterable[Union[str, nn.Module, Tensor]]]

_FEATURE_LEVEL = "SaliencyRegularizer(..., surgery=PCGrad()) or FeatureSurgery"


def names_of_parameters(model: nn.Module, choice: ParameterChoice, option: str) -> frozenset[str]:
    """Return the names of the parameters that ``choice`` means in the model; ``option`` is the argument it was given as."""
    single = isinstance(choice, (str, nn.Module, Tensor))
    if not single and not isinstance(choice, Iterable):
        raise WrongTypeError(
            f"{option} must be a module of the model, its name, or a list of modules and parameters; found "
            f"{type(choice).__name__}. Pass {option}=model.backbone."
        )
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    found: set[str] = set()
    for item in [choice] if single else choice:  # type: ignore[union-attr]
        if isinstance(item, Tensor):
            parameters = [item]
        else:
            parameters = list(find_module(model, item, f"module for {option}=")[1].parameters())  # type: ignore[arg-type]
        if foreign := [parameter for parameter in parameters if parameter not in names]:
            raise ConfigurationError(
                f"{option} has a parameter of shape {list(foreign[0].shape)} that is not among the parameters of "
                f"{type(model).__name__}. Take it from the model that surgery was given."
            )
        found.update(names[parameter] for parameter in parameters)
    if not found:
        raise ConfigurationError(f"{option} names no parameter. Name a module that has some, or leave {option}= out.")
    return frozenset(found)


def members(mask: int) -> list[int]:
    return [task for task in range(mask.bit_length()) if mask >> task & 1]


def check_connected(tasks: Mapping[int, str], shared: Sequence[int], measured: Sequence[int], named: bool) -> None:
    """Check that each of the ``tasks``, which have a loss, has a gradient where gradients are measured.

    ``shared`` and ``measured`` have a mask of tasks for each such parameter. ``named``: the user said what is shared.
    """
    if not shared:
        where = "none of the parameters of shared=" if named else "no parameter of the model"
        raise NotConnectedError(
            f"the losses of {first_few(list(tasks.values()))} have {where} in common that requires grad, so that there is "
            "nothing to do surgery on. Compute them from one forward of the model that surgery was given, unfreeze its "
            "backbone, or call loss.backward()."
        )
    if not measured:
        raise ConfigurationError(
            "none of the parameters of measure= is shared by at least two losses and requires grad. Name a module of the "
            "backbone in measure=, or leave it out."
        )
    for task, name in tasks.items():
        if not any(mask >> task & 1 for mask in measured):
            what = "shared parameters" if len(measured) == len(shared) else "parameters of measure="
            raise NotConnectedError(
                f"the loss of task {name!r} does not depend on any of the {len(measured)} {what}, so that it has no "
                "gradient there to be weighed. Compute it from the model's forward, or add it to the second argument of "
                "backward, which is not projected."
            )


def refuse_node(node: Node) -> None:
    """Raise for a node of a loss's graph that cannot be passed several times, or that does surgery itself."""
    name = node.name()
    if getattr(node, "weighs_task_gradients", False):
        raise ConfigurationError(
            "both levels of surgery at once: a loss comes through the feature fork of SaliencyRegularizer(..., surgery=...) "
            "or FeatureSurgery, which would change the task gradients before they are measured on the parameters. Keep "
            "one: call .remove() on the FeatureSurgery or leave surgery= out and run a new forward, or call "
            "loss.backward() instead of ParameterSurgery.backward."
        )
    if "CompiledFunctionBackward" in name:
        raise ConfigurationError(
            "a loss comes through code of torch.compile. Surgery on parameters passes the same graph once for each task, "
            "which compiled code refuses (donated buffers) or, from a warm cache, answers with wrong gradients for all "
            f"tasks but the first. Leave the model uncompiled, or use {_FEATURE_LEVEL}, which needs one pass only."
        )
    if name == "CheckpointFunctionBackward":
        raise ConfigurationError(
            "a loss comes through a reentrant checkpoint, which knows no gradients of single losses. Use "
            f"checkpoint(..., use_reentrant=False), or use {_FEATURE_LEVEL}."
        )
    if name == DDP_SINK and node.ddp_weakref().static_graph:  # type: ignore[attr-defined]
        raise ConfigurationError(
            "DistributedDataParallel(static_graph=True) expects one backward pass of its own. Pass static_graph=False: "
            f"ParameterSurgery averages the gradients itself. Or use {_FEATURE_LEVEL}."
        )


def refuse_sharded(tensors: Sequence[Tensor], modules: Sequence[nn.Module] = ()) -> None:
    """Raise if parameters are split over processes (FSDP, tensor parallelism)."""
    kinds = {"DTensor" for tensor in tensors if derives_from(tensor, "DTensor")}
    kinds |= {"FlatParameter" for tensor in tensors if getattr(tensor, "_is_flat_param", False)}
    # Between forward and backward the parameters of a wrapped module may be whole.
    wrappers = ("FSDPModule", "FullyShardedDataParallel")
    kinds |= {kind for module in modules for kind in wrappers if derives_from(module, kind)}
    if kinds:
        raise ConfigurationError(
            f"the model has sharded parameters (found {first_few(sorted(kinds))}), of which each process sees a part only, "
            f"and whose gradients autograd.grad cannot take. Use {_FEATURE_LEVEL}, which works with sharded models."
        )
