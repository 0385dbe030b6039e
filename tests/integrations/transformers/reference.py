"""The slow way: one text without padding, one task, one label, one pair at a time; all of it differentiable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saliency_reg.integrations.transformers import HeadConfig


def label_losses(head: HeadConfig, logits: Tensor, labels: Tensor) -> list[list[Tensor]]:
    """``[sample][known label]``."""
    found: list[list[Tensor]] = []
    for sample in range(len(logits)):
        found.append([])
        positions = range(logits.shape[1]) if head.level == "token" else [None]
        for position in positions:
            own = logits[sample] if position is None else logits[sample, position]
            label = labels[sample] if position is None else labels[sample, position]
            if head.problem == "single_label":
                if int(label) != -100:
                    found[-1].append(own.exp().sum().log() - own[int(label)])
                continue
            for output in range(head.num_labels):
                logit = own if head.num_labels == 1 else own[output]
                value = float(label if head.num_labels == 1 else label[output])
                if value == -100 or value != value:
                    continue
                if head.problem == "regression":
                    found[-1].append((logit - value) ** 2)
                else:
                    probability = 1 / (1 + (-logit).exp())
                    found[-1].append(-(probability if value == 1 else 1 - probability).log())
    return found


def task_losses(model: Any, logits: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``{task: 0-dim}``, without those that have no known label."""
    found = {}
    for task, own in labels.items():
        losses = [loss for sample in label_losses(model.head_configs[task], logits[task], own) for loss in sample]
        if losses:
            found[task] = sum(losses[1:], start=losses[0]) / len(losses)
    return found


def weighted(model: Any, losses: Mapping[str, Tensor]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for task, loss in losses.items():
        total = total + model.head_configs[task].weight * loss
    return total


def pooled(kind: str, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """``[B, L, C] -> [B, C]``; zeros for a row without real positions."""
    rows = []
    for sample in range(len(hidden)):
        real = [hidden[sample, i] for i in range(hidden.shape[1]) if mask is None or bool(mask[sample, i])]
        if not real:
            rows.append(torch.zeros_like(hidden[sample, 0]))
        elif kind == "mean":
            rows.append(sum(real[1:], start=real[0]) / len(real))
        else:
            rows.append(real[0] if kind == "first" else real[-1])
    return torch.stack(rows)


def alone(inputs: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Each text as a batch of its own, without padding."""
    found = []
    for sample in range(len(inputs["input_ids"])):
        real = inputs["attention_mask"][sample].bool()
        found.append({name: value[sample][real][None] for name, value in inputs.items()})
    return found


def kinds(model: Any) -> dict[str, str]:
    """How each head pools."""
    return {
        task: "none" if head.level == "token" else "mean" if head.pooling == "auto" else head.pooling
        for task, head in model.head_configs.items()
    }


def at_feature(model: Any, text: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The feature map that all heads share, and their logits, of a batch of one text without padding."""
    output = model.encoder(**text)
    hidden, poolings = output.last_hidden_state, kinds(model)
    shared = len(set(poolings.values())) == 1 and "none" not in poolings.values()
    (kind,) = set(poolings.values()) if shared else {"none"}
    feature = output.pooler_output if kind == "pooler" else pooled(kind, hidden) if shared else hidden
    logits = {}
    for task, head in model.heads.items():
        own = feature if shared or poolings[task] == "none" else pooled(poolings[task], hidden)
        logits[task] = head.layers(own)
    return feature, logits


def scalar(logits: Tensor, problem: str) -> Tensor:
    """Sum over positions of the logit, the sum of logits that are no classes, or else what sets classes apart."""
    rows = list(logits.reshape(-1, logits.shape[-1]))
    if problem != "single_label":
        values = [row.sum() for row in rows]
    else:
        values = [row[1] - row[0] if len(row) == 2 else row.max() - row.sum() / len(row) for row in rows]
    return sum(values[1:], start=values[0])


def penalty(model: Any, inputs: Mapping[str, Tensor], tasks: tuple[str, ...] | None = None) -> Tensor:
    """All pairs weigh 1: sum over pairs of the mean over texts of the l1 distance of the saliencies.

    At hidden states these are sums over the tokens, or means if any head is on tokens.
    """
    tasks = model.tasks if tasks is None else tasks
    texts = alone(inputs)
    tokens = any(head.level == "token" for head in model.head_configs.values())
    total = torch.zeros((), dtype=torch.float64)
    for text in texts:
        feature, logits = at_feature(model, text)
        saliencies = []
        for task in tasks:
            (gradient,) = torch.autograd.grad(
                scalar(logits[task], model.head_configs[task].problem), feature, create_graph=True
            )
            own = gradient[0]
            positions = 1 if own.ndim == 1 or not tokens else len(own)
            saliencies.append(own if own.ndim == 1 else sum(own[1:], start=own[0]) / positions)
        for first in range(len(tasks)):
            for second in range(first + 1, len(tasks)):
                total = total + (saliencies[first] - saliencies[second]).abs().sum() / len(texts)
    return total


def padded_logits(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of each text alone, ``[B, ...]`` as the model returns them, with zeros at padding."""
    found: dict[str, list[Tensor]] = {task: [] for task in model.tasks}
    for sample, text in enumerate(alone(inputs)):
        _, logits = at_feature(model, text)
        for task, own in logits.items():
            own = own.squeeze(-1) if own.shape[-1] == 1 else own
            if model.head_configs[task].level == "token":
                real = inputs["attention_mask"][sample].bool()
                whole = own.new_zeros(1, len(real), *own.shape[2:])
                whole[:, real] = own
                own = whole
            found[task].append(own)
    return {task: torch.cat(rows) for task, rows in found.items()}
