"""A timm model as a backbone: its output is the feature map before pooling."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ....errors import ConfigurationError, WrongTypeError
from ....torch_tools import leaves_behind, whole_number
from ...shared.libraries import need
from ...shared.looking import first_line, undisturbed
from ..errors import ImageSizeError, NoSpatialFeatureError
from .creating import check_model_name, create_timm_model
from .feature_layout import FeatureLayout, find_layout
from .freezing import Freezing
from .probing import blank_images, published_config

#: Options of ``timm.create_model`` that have a place of their own here.
_ARGUMENTS_HERE = {
    "num_classes": "heads=",
    "global_pool": "HeadConfig(pooling=...)",
    "in_chans": "in_chans=",
    "img_size": "image_size=",
    "drop_rate": "drop_rate=",
    "drop_path_rate": "drop_path_rate=",
    "pretrained": "pretrained=",
    "checkpoint_path": "checkpoint_path=",
    "features_only": "the model as it is",
}


class Backbone(Freezing):
    """Return the feature map of a timm model, ``forward_features``, as ``layout`` says; several maps are joined to one.

    Parameters of ``model``, the timm model, that only its classifier part uses are frozen, as they get no gradient here.
    """

    def __init__(self, model: nn.Module, in_chans: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.model = model
        self.image_size = image_size
        name = type(model).__name__
        if not callable(getattr(model, "forward_features", None)):
            raise NoSpatialFeatureError(
                f"{name} has no forward_features, which returns the map before pooling. Choose another timm model."
            )
        with undisturbed(model), torch.enable_grad():
            features = _probed(model, in_chans, image_size)
            self.layout: FeatureLayout = find_layout(features, model, image_size)
            used = {id(leaf) for leaf in leaves_behind([features] if isinstance(features, Tensor) else features)}
            self._pooled_norm = _norm_behind_pooling(model, features)
        self._idle = frozenset(name for name, parameter in model.named_parameters() if id(parameter) not in used)
        self._apply_freezing()

    def forward(self, images: Tensor) -> Tensor:
        """Return the feature map of images ``[B, in_chans, H, W]``."""
        features = self.model.forward_features(images)  # type: ignore[operator]
        return self.layout.join(features, (int(images.shape[-2]), int(images.shape[-1])))

    def pooled_norm(self) -> nn.LayerNorm | None:
        """Return a copy of the LayerNorm that timm's own classifier part has behind the pooling, if there is one."""
        if self._pooled_norm is None:
            return None
        norm = self.model.get_submodule(self._pooled_norm)
        if not isinstance(norm, nn.LayerNorm):  # replaced since the probe
            return None
        weight, bias = norm.weight, norm.bias
        copied = nn.LayerNorm(norm.normalized_shape, norm.eps, weight is not None, bias is not None)
        if weight is not None:
            copied.to(weight)  # first, or the values are rounded on their way
        copied.load_state_dict({name: value for name, value in norm.state_dict().items() if name in ("weight", "bias")})
        return copied

    def extra_repr(self) -> str:
        return self.layout.describe()


def create_backbone(
    name: str,
    *,
    pretrained: bool,
    in_chans: int,
    image_size: tuple[int, int] | None,
    drop_path_rate: float | None,
    options: Mapping[str, Any],
) -> Backbone:
    """Build the timm model ``name`` without its classifier, for images of this size."""
    timm = need("timm")
    check_model_name(name)
    whole_number("in_chans", in_chans, least=1)
    keywords = {**options, "num_classes": 0, "in_chans": in_chans}
    if drop_path_rate is not None:
        keywords["drop_path_rate"] = drop_path_rate
    size_options: list[dict[str, Any]] = [{}]
    if image_size is not None:
        config = timm.get_pretrained_cfg(name, allow_unregistered=True) if ":" not in name else None
        sized = {"img_size": image_size}
        # Position embeddings are made for one size; models without them know no such option.
        size_options = [sized, {}] if config is None or config.fixed_input_size else [{}, sized]
    refused: list[ConfigurationError | ImageSizeError] = []
    for size_option in size_options:
        try:
            model = create_timm_model(name, pretrained, {**keywords, **size_option})
            return Backbone(model, in_chans, image_size or _own_image_size(model))
        except (ConfigurationError, ImageSizeError) as error:
            refused.append(error)
    # What the model says of the size tells more than that it knows no such option.
    raise next((error for error in refused if isinstance(error, ImageSizeError)), refused[0])


def image_size_pair(image_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """Return ``(height, width)`` of what the user passed as side or pair."""
    if image_size is None:
        return None
    if isinstance(image_size, numbers.Integral) and not isinstance(image_size, bool):
        side = whole_number("image_size", image_size, least=1)
        return side, side
    if isinstance(image_size, (tuple, list)) and len(image_size) == 2:
        height, width = (whole_number("each side of image_size", side, least=1) for side in image_size)
        return height, width
    raise WrongTypeError(f"image_size must be an int or (height, width), found {image_size!r}. Pass image_size=224.")


def _own_image_size(model: nn.Module) -> tuple[int, int]:
    size = published_config(model).get("input_size", (3, 224, 224))
    return int(size[-2]), int(size[-1])


def checked_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return further options of ``timm.create_model``, none of which is given in another way."""
    if options is None:
        return {}
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise WrongTypeError(
            f"backbone_options must be a dict of options of timm.create_model, found {type(options).__name__}. Pass "
            "backbone_options={'act_layer': 'silu'}."
        )
    for name in options:
        if name in _ARGUMENTS_HERE:
            raise ConfigurationError(
                f"backbone_options has {name!r}, which is given in another way: {_ARGUMENTS_HERE[name]}."
            )
    return dict(options)


def _probed(model: nn.Module, in_chans: int, image_size: tuple[int, int]) -> Any:
    try:
        return model.forward_features(blank_images(model, in_chans, image_size))  # type: ignore[operator]
    except Exception as error:  # models refuse sizes with assert, with torch's own shape errors, ...
        own, least = _own_image_size(model), published_config(model).get("min_input_size")
        at_least = f", at least {least[-2]}x{least[-1]}" if least else ""
        raise ImageSizeError(
            f"{type(model).__name__} cannot process images of {image_size[0]}x{image_size[1]} with {in_chans} channels "
            f"({type(error).__name__}: {first_line(error)}). It was made for {own[0]}x{own[1]}{at_least}. Pass "
            f"image_size={own if own[0] != own[1] else own[0]}, or a multiple of {_stride(model)}."
        ) from error


def _stride(model: nn.Module) -> int:
    """Return the pixels per position of the last map, as far as timm tells."""
    info = getattr(model, "feature_info", None)
    try:
        return int(info[-1]["reduction"])  # type: ignore[index]
    except (TypeError, KeyError, IndexError, ValueError):
        return 32


def _norm_behind_pooling(model: nn.Module, features: Any) -> str | None:
    """Return the name of the LayerNorm that ``forward_head`` applies to the pooled feature."""
    head = getattr(model, "forward_head", None)
    if head is None or "pre_logits" not in inspect.signature(head).parameters:
        return None
    found: list[nn.Module] = []

    def note(module: Any, args: Any) -> None:
        shape = module.normalized_shape
        pooled = args and isinstance(args[0], Tensor) and args[0].numel() == len(args[0]) * shape[0]
        if len(shape) == 1 and pooled and args[0].ndim != 3:  # [B, 1, C] is inside of attention pooling
            found.append(module)

    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    handles = [module.register_forward_pre_hook(note) for module in norms]
    try:
        with torch.no_grad():
            head(features, pre_logits=True)
    except Exception:  # an encoder without a classifier part, or one that does not fit
        return None
    finally:
        for handle in handles:
            handle.remove()
    return next((name for name, module in model.named_modules() if found and module is found[-1]), None)
