"""transformers: multi-task models over any of its encoders, the regularizer on its classifiers, and the Trainer.

>>> from saliency_reg.integrations.transformers import HeadConfig, MultiTaskModel, SaliencyTrainer, saliency_regularizer
"""

import importlib
from typing import TYPE_CHECKING, Any

from .errors import (
    ClassifierNotFoundError,
    EncoderError,
    LabelError,
    PretrainedWeightsError,
    TokenizerMismatchError,
    UnknownTaskError,
    UnsupportedTrainerError,
)
from .model.head_config import HeadConfig

if TYPE_CHECKING:
    from .classifier.classifier import find_classifier
    from .classifier.unmodified import saliency_regularizer
    from .model.collator import MultiTaskCollator
    from .model.configuration import MultiTaskConfig
    from .model.model import MultiTaskModel
    from .model.output import MultiTaskOutput
    from .trainer.loss import SaliencyLoss
    from .trainer.trainer import SaliencyTrainer, SaliencyTrainerMixin

__all__ = [
    "ClassifierNotFoundError",
    "EncoderError",
    "HeadConfig",
    "LabelError",
    "MultiTaskCollator",
    "MultiTaskConfig",
    "MultiTaskModel",
    "MultiTaskOutput",
    "PretrainedWeightsError",
    "SaliencyLoss",
    "SaliencyTrainer",
    "SaliencyTrainerMixin",
    "TokenizerMismatchError",
    "UnknownTaskError",
    "UnsupportedTrainerError",
    "find_classifier",
    "saliency_regularizer",
]

#: What needs transformers itself, or its Trainer, which takes seconds to import, is imported when it is first asked for.
_WHERE = {
    "MultiTaskCollator": "model.collator",
    "MultiTaskConfig": "model.configuration",
    "MultiTaskModel": "model.model",
    "MultiTaskOutput": "model.output",
    "SaliencyLoss": "trainer.loss",
    "SaliencyTrainer": "trainer.trainer",
    "SaliencyTrainerMixin": "trainer.trainer",
    "find_classifier": "classifier.classifier",
    "saliency_regularizer": "classifier.unmodified",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
