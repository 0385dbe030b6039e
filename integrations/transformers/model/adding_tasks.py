"""A multi-task model to which tasks are added."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import nn

from .... import SaliencyRegularizer
from ...shared.changing_heads import ChangingHeads, alike
from .head_config import HeadConfig, head_configs, scalarize_of
from .pooling import SequencePooling
from .task_heads import build_head, pooling_of

_OTHER_POOLING = (
    "Pass a HeadConfig(pooling=...) like that, on sequences; or build a new model with all heads on this one's encoder: "
    "MultiTaskModel.from_encoder(model.encoder, heads), and load_state_dict(model.state_dict(), tasks='common')."
)


class AddingTasks(ChangingHeads):
    """What a multi-task model has in order to take another task."""

    config: Any
    encoder: Any
    pooling: SequencePooling
    hidden_width: int

    if TYPE_CHECKING:  # what a PreTrainedModel has, of whose types nothing is known

        def __getattr__(self, name: str) -> Any: ...

    def add_task(
        self,
        name: str,
        num_labels: int | HeadConfig = 1,
        *,
        head: HeadConfig | None = None,
        freeze_others: bool = False,
        regularizer: SaliencyRegularizer | None = None,
    ) -> None:
        """Put in one more head, behind the others and begun as they were. No weight that is there changes.

        ``config`` is a new object. Let the optimizer train the head, as that of a ``Trainer`` that is built afterwards does:
        ``optimizer.add_param_group({"params": model.heads[name].parameters()})``.

        Args:
            name: of the task.
            num_labels: its number of labels, or a :class:`HeadConfig`.
            head: the :class:`HeadConfig` that a number of labels is filled up with.
            freeze_others: train it alone, see :meth:`freeze_others`.
            regularizer: the one that is attached to the heads: it takes the task, too (``SaliencyRegularizer.add_task``).

        Raises:
            TaskError: there is a task of this name, or it cannot name a head.
            ConfigurationError: the others share a pooling, and this head has another one.
            SaliencyRegError: those of the regularizer; the model is then as it was.

        Example:
            >>> from transformers import BertConfig
            >>> from saliency_reg.integrations.transformers import MultiTaskModel
            >>> tiny = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
            >>> model = MultiTaskModel.from_encoder(tiny, {"joy": 1, "topic": 4})
            >>> regularizer = model.regularizer(strength=0.1)
            >>> model.add_task("anger", regularizer=regularizer)
            >>> model.tasks == model.config.tasks == regularizer.tasks == ("joy", "topic", "anger")
            True
        """
        self._check_new(name)
        config = head_configs({name: num_labels}, head)[name]
        head_configs({**self.head_configs, name: config}, None)  # whether they share a feature map
        kind = pooling_of(config, self.encoder.config, is_part=self.config.encoder_part == "encoder")
        if self.pooling.kind != "none":
            alike(kind, self.pooling.kind, name, _OTHER_POOLING)
        new: nn.Module = build_head(config, kind, self.pooling.kind, self.encoder.config, self.hidden_width)
        new.apply(self._init_weights)
        self._put_head(name, config, new, freeze_others=freeze_others, regularizer=regularizer)

    def _init_weights(self, module: nn.Module) -> None:
        raise NotImplementedError

    def _take_configs(self, configs: dict[str, HeadConfig]) -> None:
        super()._take_configs(configs)
        self.config = copy.copy(self.config)  # other models may have this one
        self.config.heads = {task: config.to_dict() for task, config in configs.items()}

    def _of_new_task(self, name: str, scalarize: Any) -> tuple[bool, Any]:
        """Whether a head is on tokens, and how its output is scalarised where that is another choice than for all."""
        config = self.head_configs.get(name)
        if config is None or scalarize is None:
            return config is not None and config.level == "token", None
        chosen = scalarize_of(scalarize, {name: config})
        return config.level == "token", chosen[name] if isinstance(chosen, dict) else chosen
