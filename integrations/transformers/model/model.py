"""An encoder with a head for each task, as a model of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .... import SaliencyRegularizer
from ....errors import ConfigurationError, TaskError, WrongTypeError
from ...shared.libraries import need
from ..errors import UnknownTaskError
from .adding_tasks import AddingTasks
from .configuration import MultiTaskConfig
from .encoder import Encoded, as_encoder, build_encoder, check_has_model, encoded, hidden_width_of, load_encoder
from .head_config import HeadConfig, HeadsDescription, head_configs, scalarize_of
from .losses import check_tasks, losses_per_sample, task_loss, zero_loss
from .masked import MaskedRegularizer
from .output import MultiTaskOutput
from .task_heads import build_heads

_transformers = need("transformers")


class MultiTaskModel(AddingTasks, _transformers.PreTrainedModel):  # type: ignore[misc,name-defined]
    """Any encoder of transformers with a head for each task, on sequences or on tokens.

    It is a ``PreTrainedModel``: ``save_pretrained``, ``from_pretrained``, ``push_to_hub``, ``Trainer``,
    ``gradient_checkpointing_enable`` and the rest work as for any other; ``AutoModel.from_pretrained`` reads it once this
    package was imported. Build it with :meth:`from_encoder`. Tasks may come and go: :meth:`add_task`,
    :meth:`remove_task`; and :meth:`load_state_dict` takes states of other tasks.

    Args:
        config: of the encoder and the heads; all weights are new.

    Attributes:
        encoder: the model of transformers.
        pooling: of the hidden states, where all heads are on sequences and pool alike; otherwise it passes them on, padding
            as zeros, and each head has its own.
        heads: ``nn.ModuleDict`` in the order of the tasks.

    Shape:
        what the encoder reads -> ``logits`` ``{task: [B, K]}``, ``[B, L, K]`` for token heads, without the last axis for
        one output.

    Raises:
        EncoderError, ConfigurationError, TaskError, WrongTypeError: a configuration that makes no model.

    Example:
        >>> import torch
        >>> from transformers import BertConfig
        >>> from saliency_reg.integrations.transformers import HeadConfig, MultiTaskModel
        >>> tiny = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        >>> model = MultiTaskModel.from_encoder(tiny, {"joy": 1, "topic": 4}, head=HeadConfig(hidden=(8,)))
        >>> regularizer = model.regularizer(strength=0.1)
        >>> ids = torch.randint(50, (2, 7))
        >>> output = model(input_ids=ids, labels={"joy": torch.tensor([1, 0]), "topic": torch.tensor([3, -100])})
        >>> {task: list(logits.shape) for task, logits in output.logits.items()}
        {'joy': [2], 'topic': [2, 4]}
        >>> (output.loss + regularizer()).backward()
    """

    config_class = MultiTaskConfig
    # None: the loader would take names of the encoder's own parts, such as its "encoder", for the prefix.
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # What the encoder has is asked of it.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    #: The loss is a mean over the known labels of the batch: Trainer divides it by the accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config: MultiTaskConfig, *, _encoder: Any = None) -> None:
        super().__init__(config)
        if not isinstance(config, MultiTaskConfig) or config.encoder_config is None or not config.heads:
            raise ConfigurationError(
                "a MultiTaskModel needs a MultiTaskConfig with an encoder and heads. Use "
                "MultiTaskModel.from_encoder('bert-base-uncased', {'joy': 1, 'topic': 4})."
            )
        self.head_configs = head_configs(config.head_configs, None)
        if _encoder is None:
            _encoder = build_encoder(config.encoder_config, config.encoder_class, config.encoder_part)
        self.encoder = _encoder
        self.main_input_name = getattr(_encoder, "main_input_name", "input_ids")
        self.hidden_width = hidden_width_of(_encoder) if config.hidden_width is None else config.hidden_width
        is_part = config.encoder_part == "encoder"
        self.pooling, self.heads = build_heads(self.head_configs, _encoder.config, self.hidden_width, is_part=is_part)
        self._encoder_arguments = frozenset(inspect.signature(type(_encoder).forward).parameters)
        self.post_init()

    @classmethod
    def from_encoder(
        cls,
        encoder: Any,
        heads: HeadsDescription,
        *,
        head: HeadConfig | None = None,
        hidden_width: int | None = None,
        **options: Any,
    ) -> MultiTaskModel:
        """Build new heads on a pretrained encoder, or on a new one.

        Args:
            encoder: hub id or folder of any model that ``AutoModel`` reads; a model of transformers (its classifier, if it
                has one, is left out, and so is the decoder of an encoder-decoder); or a configuration, for new weights.
            heads: ``{task: num_labels}``, ``{task: HeadConfig}``, or a list of task names.
            head: the :class:`HeadConfig` that numbers of labels and names alone are filled up with.
            hidden_width: channels of the encoder's last hidden state, where its configuration does not tell.
            options: of ``AutoModel.from_pretrained``, for an id or a folder.

        Raises:
            PretrainedWeightsError: the encoder could not be loaded.
            EncoderError: it cannot be the encoder of a multi-task model.
            TaskError, ConfigurationError, WrongTypeError: bad arguments.

        Example:
            >>> from transformers import BertConfig
            >>> from saliency_reg.integrations.transformers import MultiTaskModel
            >>> tiny = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
            >>> MultiTaskModel.from_encoder(tiny, ["joy", "anger"]).tasks
            ('joy', 'anger')
        """
        configs = head_configs(heads, head)
        if isinstance(encoder, _transformers.PretrainedConfig):
            _check_no_options(options, "a configuration")
            check_has_model(encoder)
            build = _transformers.AutoModel.from_config
            whole = build(encoder) if encoder.is_encoder_decoder else build_encoder(encoder, None, "whole")
        elif isinstance(encoder, str) or hasattr(encoder, "__fspath__"):
            whole = load_encoder(str(encoder), **options)
        else:
            _check_no_options(options, "a model")
            whole = encoder
        own, name, part = as_encoder(whole)
        config = MultiTaskConfig(
            own.config if part == "whole" else whole.config,
            configs,
            encoder_class=name,
            encoder_part=part,
            hidden_width=hidden_width_of(own) if hidden_width is None else hidden_width,
            dtype=own.dtype,
        )
        model = cls(config, _encoder=own)
        model.heads.to(device=own.device, dtype=own.dtype)
        return model

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order of the heads."""
        return tuple(self.head_configs)

    @property
    def _on_tokens(self) -> list[str]:
        """Tasks whose heads have an output for each token."""
        return [task for task, own in self.head_configs.items() if own.level == "token"]

    def get_input_embeddings(self) -> Any:
        """Return those of the encoder."""
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        """Replace those of the encoder."""
        self.encoder.set_input_embeddings(value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_values: Tensor | None = None,
        input_features: Tensor | None = None,
        labels: Mapping[str, Tensor | None] | None = None,
        tasks: Sequence[str] | str | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **encoder_inputs: Any,
    ) -> Any:
        """Return the logits of each task, and the losses of those with labels.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, pixel_values, input_values,
                input_features: what the encoder reads; ``attention_mask`` also tells which positions are padding.
            labels: ``{task: labels}``, ``-100`` (or NaN) for missing ones. A task that is not there has no label in this
                batch; its head runs all the same, for its saliency.
            tasks: those whose heads run, by default all.
            output_attentions, output_hidden_states: of the encoder.
            return_dict: ``False`` for a tuple.
            encoder_inputs: further arguments of the encoder.

        Returns:
            :class:`MultiTaskOutput`.

        Raises:
            UnknownTaskError, LabelError, WrongTypeError: labels or tasks that do not fit.
            TokenizerMismatchError: token ids without an embedding.
            EncoderError, ShapeError: an encoder that returns something else.
        """
        chosen = self._chosen(tasks)
        given = {} if labels is None else check_tasks(labels, self.head_configs)
        if without := [task for task in given if task not in chosen]:
            raise UnknownTaskError(
                f"labels has {without}, whose heads do not run: tasks={list(chosen)}. Name them there."
            )
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "pixel_values": pixel_values,
            "input_values": input_values,
            "input_features": input_features,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            **encoder_inputs,
        }
        found = self._encode({name: value for name, value in inputs.items() if value is not None})
        feature = self.pooling(found.hidden, found.mask, found.pooler)
        logits = {task: self.heads[task](feature, found.mask) for task in chosen}
        words = next((own.shape[1] for own in (input_ids, inputs_embeds) if own is not None), None)
        if words is not None:  # patches of a picture may follow the words
            on_tokens = self._on_tokens
            logits = {task: own[:, :words] if task in on_tokens else own for task, own in logits.items()}
        loss, losses = (None, None) if labels is None else self._losses(logits, given, found.pooler)
        output = MultiTaskOutput(loss, logits, losses, found.hidden_states, found.attentions)
        use_tuple = return_dict is False or (return_dict is None and not getattr(self.config, "return_dict", True))
        return output.to_tuple() if use_tuple else output

    def sample_losses(self, logits: Mapping[str, Tensor], labels: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """Return ``{task: [B]}``: each sample's mean over its known labels, 0 where it has none; for ``target="loss"``.

        Raises:
            UnknownTaskError, LabelError, WrongTypeError: labels that do not fit.
        """
        given = check_tasks(labels, self.head_configs)
        if without := [task for task in given if task not in logits]:
            raise UnknownTaskError(f"labels has {without}, but logits only {list(logits)}. Leave these labels out.")
        return {
            task: losses_per_sample(task, self.head_configs[task], logits[task], own) for task, own in given.items()
        }

    def regularizer(self, **options: Any) -> SaliencyRegularizer:
        """Return a :class:`SaliencyRegularizer` on the heads, which leaves padding out.

        Where all heads are on sequences and pool alike, the saliency is taken at the pooled vector ``[B, C]``. Otherwise it
        is taken at the last hidden state ``[B, L, C]`` and pooled over the real tokens: by default with ``pool="sum"`` where
        all heads are on sequences, and ``"mean"`` if any is on tokens, because its sum would grow with the length of the
        texts.

        Args:
            options: of the class: ``strength``, ``optimizer``, ``surgery``, ``metric``, ...

        Raises:
            SaliencyRegError: those of the class; ``heads`` and ``tasks`` are known here.
        """
        if clash := sorted({"heads", "tasks", "channel_axis"} & set(options)):
            raise ConfigurationError(f"{clash} are known here. Leave them out, or use SaliencyRegularizer(model, ...).")
        if len(self.heads) < 2:
            raise TaskError(
                f"this model has one task, {list(self.tasks)}, and relations need at least 2. Give it more heads, or train "
                "it without a regularizer."
            )
        if self.pooling.kind == "none":
            options = {"pool": "mean" if self._on_tokens else "sum", "channel_axis": -1, **options}
        choice = options.pop("scalarize", "auto")
        tokens, scalarize = self._on_tokens, scalarize_of(choice, self.head_configs)
        mask_from = ((self.pooling,), "mask")
        regularizer = MaskedRegularizer(
            self, heads="heads", mask_from=mask_from, tokens=tokens, scalarize=scalarize, **options
        )
        regularizer.ask_of_new_tasks(self._of_new_task, choice)
        return regularizer

    def _chosen(self, tasks: Sequence[str] | str | None) -> tuple[str, ...]:
        if tasks is None:
            return self.tasks
        if not isinstance(tasks, Iterable):
            raise WrongTypeError(f"tasks must be a list of task names, found {tasks!r}. Choose of {list(self.tasks)}.")
        names = (tasks,) if isinstance(tasks, str) else tuple(tasks)
        if unknown := [task for task in names if task not in self.head_configs]:
            raise UnknownTaskError(f"tasks= names {unknown}, which this model does not have: {list(self.tasks)}.")
        if not names:
            raise UnknownTaskError(f"tasks= is empty. Name some of {list(self.tasks)}, or leave it out for all.")
        return tuple(task for task in self.tasks if task in names)

    def _encode(self, inputs: dict[str, Any]) -> Encoded:
        # A tokenizer makes more than some encoders read (token types, for one).
        if "kwargs" not in self._encoder_arguments:
            inputs = {name: value for name, value in inputs.items() if name in self._encoder_arguments}
        elif "token_type_ids" not in self._encoder_arguments:
            inputs.pop("token_type_ids", None)
        return encoded(self.encoder, inputs, self.hidden_width)

    def _losses(
        self, logits: Mapping[str, Tensor], given: Mapping[str, Tensor], pooler: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        sums = {task: task_loss(task, self.head_configs[task], logits[task], own) for task, own in given.items()}
        # No label of a task in the batch: no loss, and no gradient of zeros either. A device is waited for once.
        counts = torch.stack([known for _, known in sums.values()]).tolist() if sums else []
        losses = {task: total / known for (task, (total, known)), count in zip(sums.items(), counts) if count}
        parts = [self.head_configs[task].weight * loss for task, loss in losses.items()]
        if not parts:
            return zero_loss(logits), losses
        loss = torch.stack(parts).sum()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # DistributedDataParallel waits for a gradient of each parameter that has run.
            idle = {task: own for task, own in logits.items() if task not in losses}
            if pooler is not None and self.pooling.kind != "pooler":
                idle["pooler"] = pooler
            loss = loss + zero_loss(idle) if idle else loss
        return loss, losses

    def _init_weights(self, module: nn.Module) -> None:
        # Those of the encoder begin as its own class has them: it did that when it was built.
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(mean=0.0, std=getattr(self.config.encoder_config, "initializer_range", 0.02))
            if module.bias is not None:
                module.bias.data.zero_()


def _check_no_options(options: Mapping[str, Any], what: str) -> None:
    if options:
        raise WrongTypeError(
            f"{sorted(options)} are options of from_pretrained(), but encoder= is {what}. Set them there, or leave them out."
        )


_transformers.AutoModel.register(MultiTaskConfig, MultiTaskModel, exist_ok=True)
