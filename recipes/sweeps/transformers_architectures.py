"""One architecture of transformers through a training step with the regularizer and through its files, in both ways."""

from __future__ import annotations

import contextlib
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from saliency_reg import PCGrad
from saliency_reg.integrations.transformers import (
    HeadConfig,
    MultiTaskModel,
    find_classifier,
    saliency_regularizer,
)

from ..runtime.errors import need
from .checks import check_step, must, reason_of
from .tiny_models.entry import LABELS, TinyModel, base_model, classifier_model
from .tiny_models.registry import TINY_MODELS

__all__ = ["FAILED", "NONE", "OK", "WAYS", "check_architecture"]

WAYS = ("unmodified", "multi_task")
#: How a way went; NONE: transformers has no classifier.
OK, NONE, FAILED = "ok", "none", "FAILED"
TASKS = tuple(f"task {column}" for column in range(LABELS))
BATCH_SIZE = 4
#: Columns of padding that are taken away.
PADDING = 3
#: Between penalties, and hidden states, with more and with less padding.
PENALTY_TOLERANCE, HIDDEN_TOLERANCE = 1e-4, 1e-5
#: Between the logits before saving and after loading: weights that lie elsewhere in memory may be summed in another order.
LOADING_TOLERANCE = 1e-6
#: What a text has for each of its tokens.
_PER_TOKEN = (
    "input_ids",
    "attention_mask",
    "bbox",
    "xpath_tags_seq",
    "xpath_subs_seq",
    "input_shape_ids",
    "input_pronunciation_ids",
)


def check_architecture(key: str, seed: int = 0) -> dict[str, Any]:
    """What works with an architecture of :data:`TINY_MODELS`.

    Returns:
        ``architecture``, ``modality``, for each of the ways ``unmodified`` and ``multi_task`` one of ``"ok"``, ``"none"``
        and ``"FAILED"``, ``reasons`` of those that are not ok, ``classifier`` (its name, or ``None``), ``loaded`` (by way,
        the largest difference of the logits after loading), ``notes``, and ``seconds``.
    """
    begun = time.monotonic()
    entry = TINY_MODELS[key]
    result: dict[str, Any] = {
        "architecture": key,
        "modality": entry.modality,
        "classifier": None,
        "reasons": {},
        "loaded": {},
        "notes": [],
    }
    checks: dict[str, Callable[[TinyModel, dict[str, Any]], None]] = {
        "unmodified": _check_unmodified,
        "multi_task": _check_multi_task,
    }
    for way, check in checks.items():
        if way == "unmodified" and entry.auto_class is None:
            result[way] = NONE
            result["reasons"][way] = entry.no_classifier
            continue
        torch.manual_seed(seed)
        with _quiet(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                check(entry, result)
                result[way] = OK
            except Exception as error:
                result[way] = FAILED
                result["reasons"][way] = reason_of(error)
        for each in caught:
            told = f"{way}: {' '.join(str(each.message).split())[:120]}"
            if told not in result["notes"]:
                result["notes"].append(told)
    result["seconds"] = time.monotonic() - begun
    return result


def _check_unmodified(entry: TinyModel, result: dict[str, Any]) -> None:
    model = classifier_model(entry).train()
    result["classifier"] = find_classifier(model)
    head = model.get_submodule(result["classifier"])
    inputs = entry.inputs(BATCH_SIZE, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    # A BatchNorm between feature and logits makes the sum over the batch constant, and its saliency rounding errors.
    regularizer = saliency_regularizer(model, tasks=TASKS, optimizer=optimizer, surgery=PCGrad(), cross_sample="error")
    try:
        logits = model(**inputs).logits
        must(list(logits.shape) == [BATCH_SIZE, LABELS], f"logits of shape {list(logits.shape)}")
        # Outside of the model: some classifiers of recordings know no labels that go together.
        labels = _yes_or_no(BATCH_SIZE, LABELS)
        losses = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(0)
        check_step(model, regularizer, optimizer, dict(zip(TASKS, losses)))
        _check_heads(head)
    finally:
        regularizer.remove()
    if entry.modality == "text":
        result["notes"] += _check_padding(
            model, model.base_model, inputs, lambda: saliency_regularizer(model, tasks=TASKS), "unmodified"
        )
    result["loaded"]["unmodified"] = _check_files(model, inputs)


def _check_multi_task(entry: TinyModel, result: dict[str, Any]) -> None:
    # Of an encoder-decoder the whole model, of whose decoder it has to get rid.
    whole = entry.part != "vision_model"
    encoder = need("transformers").AutoModel.from_config(entry.config()) if whole else base_model(entry)
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
    regularizer = model.regularizer(optimizer=optimizer, surgery=PCGrad(), cross_sample="error")
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
    model: nn.Module,
    encoder: nn.Module,
    inputs: Mapping[str, Tensor],
    attach: Callable[[], Any],
    way: str,
) -> list[str]:
    """Notes; the penalty of the rows that end in padding is the same with less of it, if their hidden states are."""
    model.eval()
    length = inputs["input_ids"].shape[1]
    longer = {name: tensor[1:] for name, tensor in inputs.items()}  # the first row is a full one
    shorter = {name: tensor[:, :-PADDING] if name in _PER_TOKEN else tensor for name, tensor in longer.items()}
    if "attention_mask" not in inputs:
        return [f"{way}: it reads no mask, so padding takes part"]
    must(not bool(longer["attention_mask"][:, -PADDING:].any()), "a batch that does not end in padding")
    hidden: list[Tensor] = []
    watch = encoder.register_forward_hook(lambda _module, _args, output: hidden.append(output[0].detach()))
    penalties: list[float] = []
    regularizer = attach()
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
    words = mask[:, :length].bool()
    return torch.allclose(
        longer[:, :length][words], shorter[:, :length][words], atol=HIDDEN_TOLERANCE, rtol=HIDDEN_TOLERANCE
    )


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


def _yes_or_no(*shape: int) -> Tensor:
    return torch.randint(2, shape).float()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of saving and loading."""
    logging = need("transformers").utils.logging
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
