"""The layers of a timm model in the order of the forward pass, as timm groups them."""

from __future__ import annotations

from torch import nn

from ...shared.libraries import need


def layer_of_parameters(model: nn.Module) -> dict[str, int]:
    """Return the number of the layer of each parameter; without ``group_matcher``, each direct child is a layer.

    Example:
        >>> import timm
        >>> from saliency_reg.integrations.timm.backbone.layer_groups import layer_of_parameters
        >>> layers = layer_of_parameters(timm.create_model("test_resnet", num_classes=0))
        >>> layers["conv1.0.weight"], layers["layer2.0.conv1.weight"] < layers["layer3.0.conv1.weight"]
        (0, True)
    """
    names = [name for name, _ in model.named_parameters()]
    matcher = getattr(model, "group_matcher", None)
    if matcher is None:
        children = {child: number for number, (child, _) in enumerate(model.named_children())}
        return {name: children.get(name.partition(".")[0], 0) for name in names}
    found: dict[str, int] = need("timm").models.group_parameters(model, matcher(coarse=False), reverse=True)
    last = max(found.values(), default=0)
    return {name: found.get(name, last) for name in names}
