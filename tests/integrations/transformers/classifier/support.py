"""Tiny classifiers of transformers, and the penalty of each text alone."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

TASKS = ["joy", "anger", "fear"]

LENGTHS = (7, 4, 6)


def config(**options: Any) -> Any:
    return transformers.BertConfig(
        vocab_size=60,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
        **{"num_labels": 3, "problem_type": "multi_label_classification", **options},
    )


def built(kind: str = "BertForSequenceClassification", **options: Any) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, kind)(config(**options)).double()


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 60, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def sum_of_distances(rows: Tensor) -> Tensor:
    """Over pairs of tasks, of ``[T, C]``."""
    return sum(
        ((rows[i] - rows[j]).abs().sum() for i in range(len(rows)) for j in range(i + 1, len(rows))),
        start=torch.zeros((), dtype=rows.dtype),
    )
