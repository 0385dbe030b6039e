"""The configuration of a multi-task model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from ....errors import ConfigurationError, WrongTypeError
from ....torch_tools import whole_number
from ...shared.libraries import need
from .head_config import HeadConfig

MODEL_TYPE = "saliency_reg_multi_task"
_transformers = need("transformers")


class MultiTaskConfig(_transformers.PretrainedConfig):  # type: ignore[misc,name-defined]
    """An encoder's configuration, and a :class:`HeadConfig` for each task.

    Args:
        encoder_config: of the encoder, any that ``AutoConfig`` knows, or its dictionary.
        heads: ``{task: HeadConfig}``, or their dictionaries, in the order of the tasks.
        encoder_class: name of the encoder's class in transformers; by default that of ``AutoModel``.
        encoder_part: ``"whole"``, or ``"encoder"`` of an encoder-decoder.
        hidden_width: channels of the encoder's last hidden state; by default read from its configuration.
        options: of ``PretrainedConfig``.

    Raises:
        WrongTypeError, ConfigurationError: something else.

    Example:
        >>> from transformers import BertConfig
        >>> from saliency_reg.integrations.transformers import HeadConfig, MultiTaskConfig
        >>> config = MultiTaskConfig(BertConfig(), {"joy": HeadConfig(), "topic": HeadConfig(4)})
        >>> config.tasks
        ('joy', 'topic')
    """

    model_type = MODEL_TYPE
    # So that the choice of an attention implementation reaches the encoder.
    sub_configs: ClassVar[dict[str, Any]] = {"encoder_config": _transformers.AutoConfig}
    has_no_defaults_at_init = True

    def __init__(
        self,
        encoder_config: Any = None,
        heads: Mapping[str, HeadConfig | Mapping[str, Any]] | None = None,
        *,
        encoder_class: str | None = None,
        encoder_part: str = "whole",
        hidden_width: int | None = None,
        **options: Any,
    ) -> None:
        if isinstance(encoder_config, Mapping):
            given = dict(encoder_config)
            kind = given.pop("model_type", None)
            if kind is None:
                raise ConfigurationError("the encoder's configuration does not name its model_type. Save it again.")
            if kind not in _transformers.CONFIG_MAPPING:
                raise ConfigurationError(
                    f"transformers {_transformers.__version__} has no configuration with model_type={kind!r}. Use "
                    "AutoConfig.for_model('bert'), or update transformers."
                )
            encoder_config = _transformers.AutoConfig.for_model(kind, **given)
        if encoder_config is not None and not isinstance(encoder_config, _transformers.PretrainedConfig):
            raise WrongTypeError(
                f"encoder_config must be a configuration of transformers, found {type(encoder_config).__name__}. Use "
                "AutoConfig.from_pretrained(name)."
            )
        if encoder_part not in ("whole", "encoder"):
            raise ConfigurationError(f"unknown encoder_part {encoder_part!r}. Use 'whole' or 'encoder'.")
        self.encoder_config = encoder_config
        self.heads = {} if heads is None else _described(heads)
        self.encoder_class = encoder_class
        self.encoder_part = encoder_part
        self.hidden_width = None if hidden_width is None else whole_number("hidden_width", hidden_width, least=1)
        # What Trainer must not take for predictions.
        options.setdefault("keys_to_ignore_at_inference", ["losses", "hidden_states", "attentions"])
        # Otherwise the base class takes the encoder's choice away.
        options.setdefault("attn_implementation", getattr(encoder_config, "_attn_implementation", None))
        super().__init__(**options)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order of the heads."""
        return tuple(self.heads)

    @property
    def head_configs(self) -> dict[str, HeadConfig]:
        """``{task: HeadConfig}``."""
        return {task: HeadConfig(**own) for task, own in self.heads.items()}

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """Return that of the encoder, which has what other code asks for (``hidden_size``, ``vocab_size``, ...)."""
        if self.encoder_config is None:
            return self
        return self.encoder_config.get_text_config(decoder=decoder, encoder=encoder)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON has it, the encoder's configuration included."""
        found: dict[str, Any] = super().to_dict()
        if self.encoder_config is not None:
            found["encoder_config"] = self.encoder_config.to_dict()
        # The base class sorts the keys of the file, and would change the order of the tasks.
        found["heads"] = [{"task": task, **own} for task, own in self.heads.items()]
        return found


def _described(heads: Any) -> dict[str, dict[str, Any]]:
    """Bring ``{task: HeadConfig}``, or what a file has in place of it, to ``{task: dictionary}``."""
    if isinstance(heads, (list, tuple)) and all(
        isinstance(own, Mapping) and isinstance(own.get("task"), str) for own in heads
    ):
        heads = {own["task"]: {name: value for name, value in own.items() if name != "task"} for own in heads}
    if not isinstance(heads, Mapping):
        raise WrongTypeError(
            f"heads must be {{task: HeadConfig}}, found {type(heads).__name__}. Pass heads={{'joy': HeadConfig()}}."
        )
    found = {}
    for task, own in heads.items():
        if not isinstance(own, (HeadConfig, Mapping)):
            raise WrongTypeError(
                f"task {task!r} must have a HeadConfig, found {type(own).__name__}. Use HeadConfig(num_labels=...)."
            )
        if isinstance(own, Mapping):
            fields = [field.name for field in dataclasses.fields(HeadConfig)]
            if unknown := [name for name in own if name not in fields]:
                raise ConfigurationError(f"the head of task {task!r} has {unknown}. A HeadConfig has {fields}.")
            own = HeadConfig(**own)
        found[str(task)] = own.to_dict()
    return found


_transformers.AutoConfig.register(MODEL_TYPE, MultiTaskConfig, exist_ok=True)
