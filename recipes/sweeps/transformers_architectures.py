"""One architecture of transformers through a training step with the regularizer and through its files, in both ways."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from saliency_reg import PCGrad
from saliency_reg.integrations.transformers import HeadConfig, MultiTaskModel, find_classifier, saliency_regularizer

from ..runtime.errors import need
from .checks import attempt, check_step, must
from .runner import report
from .tiny_models.registry import LABELS, TINY_MODELS, TinyModel, classifier_model

WAYS = ("unmodified", "multi_task")
#: How a way went; NONE: transformers has no classifier.
OK, NONE, FAILED = "ok", "none", "FAILED"
#: Unmodified classifiers that are refused, with the error that does it.
KNOWN = {"swiftformer": "ClassifierNotFoundError"}
TASKS = tuple(f"task {column}" for column in range(LABELS))
BATCH_SIZE = 4
#: Columns of padding that are taken away.
PADDING = 3
#: Between penalties, and hidden states, with more and with less padding.
PENALTY_TOLERANCE, HIDDEN_TOLERANCE = 1e-4, 1e-5
#: Between the logits before saving and after loading: weights that lie elsewhere in memory may be summed in another order.
LOADING_TOLERANCE = 1e-6
#: It acts from the first step.
REGULARIZER: dict[str, Any] = {"strength": 0.1, "surgery": PCGrad(), "cross_sample": "error"}
_COLUMNS = ("architecture", "modality", "unmodified", "multi-task", "loaded logits", "seconds", "classifier", "notes")


def passes(result: Mapping[str, Any]) -> bool:
    """Whether both ways work."""
    return all(result[way] == OK for way in WAYS)


def as_known(result: Mapping[str, Any]) -> bool:
    """Whether both ways work, or fail as they are known to."""
    reason = result["reasons"].get("unmodified", "")
    error = KNOWN.get(result["architecture"])
    unmodified = result["unmodified"] != FAILED or (error is not None and reason.startswith(error))
    return bool(unmodified and result["multi_task"] == OK)


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One line per architecture, what does not work and why, and totals."""
    rows = [
        [
            name,
            result["modality"],
            *(result[way] for way in WAYS),
            _loaded(result["loaded"]),
            f"{result['seconds']:.1f}",
            result["classifier"] or "-",
            "; ".join(result["notes"]),
        ]
        for name, result in results.items()
    ]
    reasons = [
        [f"{name}, {way.replace('_', '-')}", result[way], reason]
        for name, result in results.items()
        for way, reason in result["reasons"].items()
    ]
    unmodified, multi_task = ([result[way] for result in results.values()] for way in WAYS)
    with_classifier = len(unmodified) - unmodified.count(NONE)
    totals = [
        f"unmodified: {unmodified.count(OK)} of {with_classifier} that transformers has a classifier for",
        f"multi-task: {multi_task.count(OK)} of {len(multi_task)}",
        f"{sum(map(passes, results.values()))} of {len(results)} architectures both ways",
    ]
    return report([_COLUMNS, *rows], len(_COLUMNS), totals, reasons)


def _loaded(differences: Mapping[str, float]) -> str:
    """Of the logits after loading: one word where both ways agree."""
    found = ["bit for bit" if each == 0 else f"to {each:.0e}" for each in differences.values()]
    return " / ".join(dict.fromkeys(found)) or "-"


def check_architecture(key: str) -> dict[str, Any]:
    """How an architecture of :data:`TINY_MODELS` does in each of the :data:`WAYS`, and ``reasons`` of those not ok.

    The ``classifier`` is its name, and ``loaded``, by way, the largest difference of the logits after loading.
    """
    begun = time.monotonic()
    result = failed(key, "", 0.0)
    for way, check in zip(WAYS, (_check_unmodified, _check_multi_task)):
        if result[way] != NONE:
            del result["reasons"][way]
            torch.manual_seed(0)
            result[way] = OK if attempt(way, partial(check, TINY_MODELS[key], result), result) else FAILED
    result["seconds"] = time.monotonic() - begun
    return result


def failed(key: str, reason: str, seconds: float) -> dict[str, Any]:
    """The result of an architecture that works in no way, for one reason."""
    entry = TINY_MODELS[key]
    result: dict[str, Any] = {
        "architecture": key,
        "modality": entry.modality,
        **dict.fromkeys(WAYS, FAILED),
        "classifier": None,
        "reasons": dict.fromkeys(WAYS, reason),
        "loaded": {},
        "notes": [],
        "seconds": seconds,
    }
    if entry.no_classifier:
        result["unmodified"], result["reasons"]["unmodified"] = NONE, entry.no_classifier
    return result


def _check_unmodified(entry: TinyModel, result: dict[str, Any]) -> None:
    model = classifier_model(entry).train()
    result["classifier"] = find_classifier(model)
    head = model.get_submodule(result["classifier"])
    inputs = entry.inputs(BATCH_SIZE, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    # A BatchNorm between feature and logits makes the sum over the batch constant, and its saliency rounding errors.
    regularizer = saliency_regularizer(model, tasks=TASKS, optimizer=optimizer, **REGULARIZER)
    try:
        logits = model(**inputs).logits
        must(list(logits.shape) == [BATCH_SIZE, LABELS], f"logits of shape {list(logits.shape)}")
        # Outside of the model: some classifiers of recordings know no labels that go together.
        labels = torch.randint(2, (BATCH_SIZE, LABELS)).float()
        losses = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(0)
        check_step(model, regularizer, optimizer, dict(zip(TASKS, losses)))
        _check_heads(head)
    finally:
        regularizer.remove()
    if entry.modality == "text":
        attach = partial(saliency_regularizer, model, tasks=TASKS)
        result["notes"] += _check_padding(model, model.base_model, inputs, attach, "unmodified")
    result["loaded"]["unmodified"] = _check_files(model, inputs)


def _check_multi_task(entry: TinyModel, result: dict[str, Any]) -> None:
    # Of an encoder-decoder the whole model, of whose decoder it has to get rid.
    encoder = need("transformers").AutoModel.from_config(entry.config())
    if entry.part:
        encoder = encoder.get_submodule(entry.part)
    heads: dict[str, int | HeadConfig] = {"a": 1, "b": 3, "c": 1}
    inputs = entry.inputs(BATCH_SIZE, seed=0)
    labels = {
        "a": torch.tensor([1, 0, 1, 0]),
        "b": torch.tensor([0, 1, 2, -100]),
        "c": torch.tensor([0, -100, 1, 1]),
    }
    shapes = [[BATCH_SIZE], [BATCH_SIZE, 3], [BATCH_SIZE]]
    if entry.modality == "text":
        heads["token"] = HeadConfig(3, level="token", hidden=(8,))
        size = inputs["input_ids"].shape
        mask = inputs.get("attention_mask", torch.ones(size))
        labels["token"] = torch.randint(3, size).masked_fill(mask == 0, -100)
        shapes.append([*size, 3])
    model = MultiTaskModel.from_encoder(encoder, heads, head=HeadConfig(hidden=(8,))).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    regularizer = model.regularizer(optimizer=optimizer, **REGULARIZER)
    try:
        output = model(**inputs, labels=labels)
        found = [list(logits.shape) for logits in output.logits.values()]
        if entry.modality == "text":
            # Patches of a picture may follow the words.
            found[-1][1] = min(found[-1][1], size[1])
        must(found == shapes, f"logits of shapes {found}")
        check_step(model.encoder, regularizer, optimizer, output.losses)
        _check_heads(model.heads)
    finally:
        regularizer.remove()
    if entry.modality == "text":
        result["notes"] += _check_padding(model, model.encoder, inputs, model.regularizer, "multi_task")
    result["loaded"]["multi_task"] = _check_files(model, inputs)


def _check_heads(heads: nn.Module) -> None:
    gradients = {name: parameter.grad for name, parameter in heads.named_parameters()}
    without = [name for name, gradient in gradients.items() if gradient is None]
    must(bool(gradients) and not without, f"head weights without a gradient: {without}")
    bad = [name for name, gradient in gradients.items() if gradient is not None and not gradient.isfinite().all()]
    must(not bad, f"head weights whose gradient is not finite: {bad}")


def _check_padding(
    model: nn.Module, encoder: nn.Module, inputs: Mapping[str, Tensor], attach: Callable[..., Any], way: str
) -> list[str]:
    """Notes; the penalty of the rows that end in padding is the same with less of it, if their hidden states are."""
    model.eval()
    length = inputs["input_ids"].shape[1]
    longer = {name: tensor[1:] for name, tensor in inputs.items()}  # the first row is a full one
    shorter = {name: tensor[:, :-PADDING] if tensor.shape[1] == length else tensor for name, tensor in longer.items()}
    if "attention_mask" not in inputs:
        return [f"{way}: it reads no mask, so padding takes part"]
    must(not bool(longer["attention_mask"][:, -PADDING:].any()), "a batch that does not end in padding")
    hidden: list[Tensor] = []
    watch = encoder.register_forward_hook(lambda _module, _args, output: hidden.append(output[0].detach()))
    penalties: list[float] = []
    regularizer = attach(strength=REGULARIZER["strength"])
    try:
        for batch in (longer, shorter):
            model(**batch)
            penalties.append(float(regularizer().detach()))
    except (RuntimeError, ValueError) as error:
        if "shape" not in str(error) and "size" not in str(error) and "divisible" not in str(error):
            raise
        return [f"{way}: not for texts of {length - PADDING} tokens"]
    finally:
        regularizer.remove()
        watch.remove()
    difference = abs(penalties[0] - penalties[1]) / abs(penalties[0])
    if difference <= PENALTY_TOLERANCE:
        return []
    if _same_at_words(hidden[0], hidden[1], longer["attention_mask"]):
        must(False, f"a penalty of {penalties[0]:.6g}, with {PADDING} columns of padding less {penalties[1]:.6g}")
    return [f"{way}: hidden states of words depend on padding, the penalty by {100 * difference:.2g} %"]


def _same_at_words(longer: Tensor, shorter: Tensor, mask: Tensor) -> bool:
    """Whether hidden states are alike at the positions that are not padding."""
    length = mask.shape[1] - PADDING
    if longer.shape[1] != shorter.shape[1] + PADDING or shorter.shape[1] < length:
        return False
    first, second = (hidden[:, :length][mask[:, :length].bool()] for hidden in (longer, shorter))
    return torch.allclose(first, second, atol=HIDDEN_TOLERANCE, rtol=HIDDEN_TOLERANCE)


def _check_files(model: Any, inputs: Mapping[str, Tensor]) -> float:
    """The largest difference between the logits before saving and after loading."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder)
    before, after = model.state_dict(), loaded.state_dict()
    must(before.keys() == after.keys(), f"after loading other weights: {sorted(before.keys() ^ after.keys())}")
    different = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    must(not different, f"after loading different weights: {different}")
    with torch.no_grad():
        outputs = [each.eval()(**inputs).logits for each in (model, loaded)]
    first, second = (output if isinstance(output, dict) else {"": output} for output in outputs)
    difference = max(float((logits - second[task]).abs().max()) for task, logits in first.items())
    must(difference <= LOADING_TOLERANCE, f"after loading logits that differ by {difference:.1g}")
    return difference
