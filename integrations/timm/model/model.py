"""A timm backbone with a head for each task."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .... import SaliencyRegularizer
from ....errors import ConfigurationError, ShapeError, WrongTypeError
from ....torch_tools import share_below_one, whole_number
from ...shared.changing_heads import ChangingHeads, alike
from ...shared.libraries import need
from ..backbone.backbone import Backbone, checked_options, create_backbone, image_size_pair
from ..backbone.backbone_checkpoint import load_backbone
from ..backbone.probing import published_config
from .head_config import HeadConfig, HeadsDescription, head_configs
from .pooling import FeaturePooling
from .saved_model import load_weights, read_config, save_model
from .task_heads import build_head, build_heads, pool_apart, pooling_of

_OTHER_POOLING = "Pass a HeadConfig(pooling=...) like that; or build a new model with all heads."


class TimmMultiTaskModel(ChangingHeads):
    """Any timm model as a backbone, and a head for each task on the feature map before pooling.

    ``SaliencyRegularizer`` finds the heads by ``heads="heads"``; :meth:`regularizer` also passes the axis of the channels.
    Tasks may come and go: :meth:`add_task`, :meth:`remove_task`; and :meth:`load_state_dict` takes states of other tasks.
    No seed is set: for the same weights, call ``torch.manual_seed`` before.

    Args:
        name: of a timm model, with or without the tag of its weights: ``"resnet18"``, ``"resnet18.a1_in1k"``,
            ``"hf-hub:owner/name"``.
        heads: ``{task: number of classes}``, ``{task: HeadConfig}``, or a list of task names.
        head: the :class:`HeadConfig` that numbers of classes and names alone are filled up with.
        pretrained: download timm's weights of the backbone.
        checkpoint_path: a file with weights of the backbone in place of a download.
        in_chans: channels of the images.
        image_size: side, or ``(height, width)``; by default what the timm model was made for. Models with position
            embeddings are built for it.
        drop_rate: dropout of heads whose ``HeadConfig`` has none.
        drop_path_rate: stochastic depth of the backbone, where the timm model has it.
        backbone_options: further options of ``timm.create_model``.

    Attributes:
        backbone: returns the feature map; ``backbone.model`` is the timm model, ``backbone.layout`` how the map is arranged.
        pooling: of the feature map, where all heads pool alike; otherwise it does nothing, and each head has its own.
        heads: ``nn.ModuleDict`` in the order of the tasks.

    Shape:
        images ``[B, in_chans, H, W]`` -> ``{task: [B]}`` for one class, ``{task: [B, K]}`` for K classes.

    Raises:
        UnknownModelError: timm has no such model; near misses are named.
        PretrainedWeightsError: there are no weights, or they could not be downloaded.
        CheckpointError: a file that is missing, not whole, or of another architecture.
        ImageSizeError: the backbone refuses the size.
        NoSpatialFeatureError: its features are none that are known.
        TaskError, ConfigurationError, WrongTypeError: bad arguments.
        MissingPackageError: timm is not installed.

    Example:
        >>> import torch
        >>> from saliency_reg.integrations.timm import HeadConfig, TimmMultiTaskModel
        >>> model = TimmMultiTaskModel("test_resnet", {"smiling": 1, "age": 5}, head=HeadConfig(hidden=(16,)), image_size=64)
        >>> {task: list(logits.shape) for task, logits in model(torch.randn(2, 3, 64, 64)).items()}
        {'smiling': [2], 'age': [2, 5]}
        >>> regularizer = model.regularizer(strength=0.1)
    """

    def __init__(
        self,
        name: str,
        heads: HeadsDescription,
        *,
        head: HeadConfig | None = None,
        pretrained: bool = False,
        checkpoint_path: str | os.PathLike[str] | None = None,
        in_chans: int = 3,
        image_size: int | tuple[int, int] | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float | None = None,
        backbone_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.head_configs = head_configs(heads, head)
        share_below_one("drop_rate", drop_rate)
        if drop_path_rate is not None:
            share_below_one("drop_path_rate", drop_path_rate)
        if pretrained and checkpoint_path is not None:
            raise ConfigurationError(
                "pretrained=True and checkpoint_path= both name weights for the backbone. Leave one of them out."
            )
        in_chans = whole_number("in_chans", in_chans, least=1)
        size = image_size_pair(image_size)
        #: All that is needed to build the model again, without its weights.
        self.description: dict[str, Any] = {
            "name": name,
            "in_chans": in_chans,
            "image_size": size,
            "drop_rate": float(drop_rate),
            "drop_path_rate": None if drop_path_rate is None else float(drop_path_rate),
            "backbone_options": checked_options(backbone_options),
        }
        self.backbone: Backbone = create_backbone(
            name,
            pretrained=pretrained,
            in_chans=in_chans,
            image_size=size,
            drop_path_rate=drop_path_rate,
            options=self.description["backbone_options"],
        )
        if checkpoint_path is not None:
            load_backbone(self.backbone.model, checkpoint_path, in_chans)
        self.pooling, self.heads = build_heads(self.head_configs, self.backbone, drop_rate)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order of the heads."""
        return tuple(self.head_configs)

    @property
    def channel_axis(self) -> int:
        """Axis of the channels of what the heads read, to be passed to ``SaliencyRegularizer(channel_axis=...)``."""
        return 1 if self._pools_for_all else self.backbone.layout.channel_axis

    @property
    def _pools_for_all(self) -> bool:
        return not isinstance(self.pooling, nn.Identity)

    @property
    def image_size(self) -> tuple[int, int]:
        """``(height, width)`` that the model was built for."""
        return self.backbone.image_size

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the logits of each task.

        Raises:
            ShapeError: images of another rank or number of channels.
        """
        in_chans = self.description["in_chans"]
        if images.ndim != 4 or images.shape[1] != in_chans:
            raise ShapeError(f"images must be [B, {in_chans}, H, W], found {list(images.shape)}.")
        feature = self.pooling(self.backbone(images))
        return {task: head(feature) for task, head in self.heads.items()}

    def regularizer(self, *, feature: str = "auto", **options: Any) -> SaliencyRegularizer:
        """Return a :class:`SaliencyRegularizer` on the heads, with the channel axis of this backbone.

        Args:
            feature: ``"auto"``: what the heads read. That is one vector per image where all of them pool alike; under
                ``pool="sum"`` penalty and surgery are the same there as at the map before pooling. ``"map"``: that map,
                for another ``pool=``; it takes more time and memory.
            options: of the class: ``strength``, ``optimizer``, ``surgery``, ...

        Raises:
            SaliencyRegError: those of the class; ``heads`` and ``channel_axis`` are known here.
        """
        if clash := sorted({"heads", "channel_axis", "tasks"} & set(options)):
            raise ConfigurationError(
                f"{clash} are known here. Leave them out, or use SaliencyRegularizer(model, heads='heads', "
                "channel_axis=model.channel_axis)."
            )
        if feature not in ("auto", "map"):
            raise ConfigurationError(
                f"unknown feature {feature!r}. Use 'auto' or 'map', or name a module in SaliencyRegularizer(model, "
                "heads='heads', feature=...)."
            )
        axis = self.channel_axis
        if feature == "map" and self._pools_for_all:
            axis, options["feature"] = self.backbone.layout.channel_axis, "backbone"
        return SaliencyRegularizer(self, heads="heads", channel_axis=axis, **options)

    def add_task(
        self,
        name: str,
        classes: int | HeadConfig = 1,
        *,
        head: HeadConfig | None = None,
        freeze_others: bool = False,
        regularizer: SaliencyRegularizer | None = None,
    ) -> None:
        """Put in one more head, behind the others and begun as they were. No weight that is there changes.

        Let the optimizer train it: ``optimizer.add_param_group(group)`` for each group in
        ``parameter_groups(model, 1e-3, task=name)``.

        Args:
            name: of the task.
            classes: its number of classes, or a :class:`HeadConfig`.
            head: the :class:`HeadConfig` that a number of classes is filled up with.
            freeze_others: train it alone, see :meth:`freeze_others`.
            regularizer: the one that is attached to the heads: it takes the task, too (``SaliencyRegularizer.add_task``).

        Raises:
            TaskError: there is a task of this name, or it cannot name a head.
            ConfigurationError: the others share a pooling, and this head has another one.
            SaliencyRegError: those of the regularizer; the model is then as it was.

        Example:
            >>> from saliency_reg.integrations.timm import TimmMultiTaskModel
            >>> model = TimmMultiTaskModel("test_resnet", {"smiling": 1, "age": 5}, image_size=64)
            >>> regularizer = model.regularizer(strength=0.1)
            >>> model.add_task("hair", 4, freeze_others=True, regularizer=regularizer)
            >>> model.tasks == regularizer.tasks == ("smiling", "age", "hair")
            True
            >>> model.unfreeze_others()
        """
        self._check_new(name)
        config = head_configs({name: classes}, head)[name]
        if isinstance(self.pooling, FeaturePooling):
            alike(pooling_of(config, self.backbone), self.pooling.kind, name, _OTHER_POOLING)
        new = build_head(config, self.backbone, self.description["drop_rate"], pools=not self._pools_for_all)
        self._put_head(name, config, new, freeze_others=freeze_others, regularizer=regularizer)

    def freeze_backbone(self, up_to: str | None = None) -> None:
        """Train the heads only, or only what comes behind a module of the backbone.

        Args:
            up_to: name of the last frozen module in the timm model, such as ``"layer2"`` or ``"blocks.5"``. In front of it
                is what timm's own layer groups have in front of it.

        Raises:
            ModuleNotFoundInModelError: there is no such module, or it has no parameters.
            WrongTypeError: no name.
        """
        self.backbone.freeze(up_to)

    def unfreeze_backbone(self) -> None:
        """Train all of it again."""
        self.backbone.unfreeze()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``model.safetensors`` and ``config.json`` into a folder, readable for everyone (mode 0644).

        Raises:
            CheckpointError: the weights could not be written, as on a full disk.
            ConfigurationError: an option in ``backbone_options`` that JSON cannot hold.
            MissingPackageError: safetensors is not installed.
        """
        # Where heads with different poolings were taken away, those that are left may pool alike, each by itself.
        kinds = {pooling_of(config, self.backbone) for config in self.head_configs.values()}
        apart = not self._pools_for_all and len(kinds) == 1 and "none" not in kinds
        description = {**self.description, "pools_apart": True} if apart else self.description
        save_model(self, description, self.head_configs, folder)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> TimmMultiTaskModel:
        """Return the model that :meth:`save` has written: the same logits to the bit, nothing downloaded, nothing frozen.

        A name that begins with ``hf-hub:`` still has its configuration read from the hub, or from its cache.

        Raises:
            CheckpointNotFoundError: a file is missing.
            CheckpointError: a file is not whole, or the weights belong to another model.
            SaliencyRegError: this timm cannot build the model any more.
        """
        description, heads = read_config(folder)
        name, dtype, apart = (description.pop(key) for key in ("name", "dtype", "pools_apart"))
        model = cls(name, heads, **description).to(dtype)
        if apart and isinstance(model.pooling, FeaturePooling):
            model.pooling = pool_apart(model.pooling, model.heads)
        load_weights(model, folder)
        return model

    def transforms(self, train: bool) -> Any:
        """Return timm's transform from a PIL image to ``[in_chans, H, W]``, with the mean and deviation of its weights.

        Args:
            train: with augmentation, for training images.

        Raises:
            WrongTypeError: ``train`` is no bool.
        """
        if not isinstance(train, bool):
            raise WrongTypeError(f"train must be a bool, found {train!r}. Call model.transforms(train=True).")
        data = need("timm").data
        in_chans = self.description["in_chans"]
        size: dict[str, Any] = {"input_size": (in_chans, *self.image_size)}
        for name in ("mean", "std"):
            value = published_config(self.backbone.model).get(name)
            if value is not None and len(value) != in_chans:
                size[name] = (sum(value) / len(value),)
        return data.create_transform(
            **data.resolve_model_data_config(self.backbone.model, args=size), is_training=train
        )
