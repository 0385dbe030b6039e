"""Batches of examples whose labels are dictionaries with gaps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from saliency_reg.errors import ShapeError, WrongTypeError
from saliency_reg.integrations.transformers import (
    HeadConfig,
    LabelError,
    MultiTaskCollator,
    MultiTaskConfig,
    UnknownTaskError,
)
from tests.integrations.transformers.tiny import built, tokenizer

HEADS = {
    "joy": HeadConfig(),
    "topic": HeadConfig(4),
    "tags": HeadConfig(3, problem="multi_label"),
    "age": HeadConfig(problem="regression"),
    "real": HeadConfig(level="token"),
    "kind": HeadConfig(5, level="token"),
    "point": HeadConfig(2, problem="regression", level="token"),
}
LENGTHS = (3, 5, 1, 4)
LABELS: list[dict[str, Any]] = [
    {"joy": 1, "tags": [1, 0, 1], "real": [1, 0, 1], "point": [[0.5, 1.5]] * 3},
    {"topic": 3, "age": 2.25, "kind": [4, -100, 0, 1, 2], "joy": None},
    {},
    {"joy": 0.0, "topic": torch.tensor(0), "tags": np.array([0, 1, -100]), "kind": np.arange(4)},
]


def examples(labels: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    labels = LABELS if labels is None else labels
    return [
        {"input_ids": list(range(2, 2 + length)), "attention_mask": [1] * length, "labels": own}
        for length, own in zip(LENGTHS, labels)
    ]


def collator(**options: Any) -> MultiTaskCollator:
    words = tokenizer(**{name: options.pop(name) for name in ("padding_side",) if name in options})
    return MultiTaskCollator(built(HEADS), words, **options)


@pytest.mark.parametrize(
    ("options", "side"),
    [({}, "right"), ({"padding_side": "left"}, "left"), ({"pad_to_multiple_of": 8}, "right")],
)
def test_a_batch_is_the_loop_over_examples(options: dict[str, Any], side: str) -> None:
    batch = collator(**options)(examples())
    width = 8 if "pad_to_multiple_of" in options else 5
    assert list(batch["labels"]) == list(HEADS)
    for row, (length, own) in enumerate(zip(LENGTHS, LABELS)):
        start = width - length if side == "left" else 0
        for place in range(width):
            inside = start <= place < start + length
            assert batch["attention_mask"][row, place] == int(inside)
            assert batch["input_ids"][row, place] == (2 + place - start if inside else 0)
        for task, head in HEADS.items():
            found, given = batch["labels"][task][row], own.get(task)
            assert found.dtype == (torch.long if head.problem == "single_label" else torch.float32)
            if given is None:
                assert (found == -100).all()
            elif head.level == "sequence":
                assert found.tolist() == torch.as_tensor(given).tolist()
            else:
                for place in range(width):
                    inside = start <= place < start + length
                    one = torch.as_tensor(given[place - start]).tolist() if inside else None
                    expected = [-100] * 2 if task == "point" and not inside else one if inside else -100
                    assert found[place].tolist() == expected, (task, row, place)


def test_padding_side_of_the_call() -> None:
    batch = MultiTaskCollator(built(HEADS), tokenizer(), padding_side="left")(examples())
    assert batch["attention_mask"][0].tolist() == [0, 0, 1, 1, 1]
    assert batch["labels"]["real"][0].tolist() == [-100, -100, 1, 0, 1]


def test_each_example_alone_has_the_same_losses() -> None:
    model = built(HEADS)
    collate = MultiTaskCollator(model, tokenizer())
    together = model(**collate(examples()))
    sums: dict[str, list[float]] = {task: [] for task in HEADS}
    for one in examples():
        batch = collate([one])
        output = model(**batch)
        for task, loss in output.losses.items():
            known = int((batch["labels"][task] != -100).sum())
            sums[task] += [loss.item()] * known
    assert sorted(together.losses) == sorted(task for task, values in sums.items() if values)
    for task, loss in together.losses.items():
        assert loss.item() == pytest.approx(sum(sums[task]) / len(sums[task]), rel=1e-10), task


def test_every_batch_has_all_tasks_or_no_labels() -> None:
    collate = collator()
    assert list(collate(examples([{"joy": 1}] * 4))["labels"]) == list(HEADS)
    nothing = collate(examples([{}] * 4))["labels"]
    assert list(nothing) == list(HEADS)
    assert all((own == -100).all() for own in nothing.values())
    without = [{name: value for name, value in one.items() if name != "labels"} for one in examples()]
    assert sorted(collate(without)) == ["attention_mask", "input_ids"]
    assert sorted(collate(examples([None] * 4))) == ["attention_mask", "input_ids"]
    output = built(HEADS)(**collate(examples([{}] * 4)))
    assert output.loss.item() == 0


def test_missing_labels_of_tables() -> None:
    """pandas has NaN also where classes are missing; a list may hold None."""
    given = [
        {"topic": math.nan, "joy": np.float64("nan"), "kind": [1, None, 2]},
        {"topic": 2.0, "tags": [1, None, 0], "age": math.nan, "kind": [math.nan] * 5},
        {"point": [[1.0, None]]},
        {},
    ]
    own = collator()(examples(given))["labels"]
    assert own["topic"].tolist() == [-100, 2, -100, -100]
    assert own["joy"].tolist() == [-100] * 4
    assert own["tags"][1].tolist() == [1, -100, 0]
    assert own["age"].tolist() == [-100] * 4
    assert own["kind"][:2].tolist() == [[1, -100, 2, -100, -100], [-100] * 5]
    assert own["point"][2, 0].tolist() == [1, -100]


def test_images_are_stacked() -> None:
    collate = MultiTaskCollator(built({"joy": HeadConfig(), "topic": HeadConfig(4)}).config)
    images = torch.randn(2, 3, 8, 8)
    found = collate([{"pixel_values": images[0], "labels": {"joy": 1}}, {"pixel_values": images[1].numpy()}])
    assert torch.equal(found["pixel_values"], images)
    assert found["labels"]["joy"].tolist() == [1, -100]
    assert found["labels"]["topic"].tolist() == [-100, -100]


def test_examples_are_left_as_they_are() -> None:
    given = examples()
    before = [dict(one) for one in given]
    collator()(given)
    assert all(one.keys() == other.keys() and one["labels"] is other["labels"] for one, other in zip(given, before))


@pytest.mark.parametrize(
    ("labels", "error", "text"),
    [
        (3, WrongTypeError, r"must be a dictionary \{task: label\}, found int. Use \{'labels': \{'joy': ...\}"),
        ({"jy": 1}, UnknownTaskError, r"labels names \['jy'\], which are no tasks. The tasks are \['joy', 'topic'"),
        ({"tags": [1, 0]}, LabelError, r"a label of task 'tags' has shape \[2\], expected \[3\]"),
        ({"joy": [1]}, LabelError, r"a label of task 'joy' has shape \[1\], expected \[\]"),
        (
            {"real": [1] * 6},
            LabelError,
            r"has shape \[6\], expected \[5\]: one for each of 5 tokens. Truncate labels as the tokenizer",
        ),
        ({"real": 1}, LabelError, r"a label of task 'real' has shape \[\], expected \[5\]: one for each"),
        ({"point": [1.0]}, LabelError, r"expected \[5, 2\]"),
        ({"topic": "sports"}, LabelError, "a label of task 'topic' holds no numbers, found 'sports'. Pass numbers"),
        ({"tags": [[1], [1, 2]]}, LabelError, r"holds no numbers, found \[\[1\], \[1, 2\]\]"),
        ({"topic": 1.5}, LabelError, "a label of task 'topic' is 1.5, expected classes, which are whole numbers"),
    ],
)
def test_wrong_labels(labels: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        collator()(examples([labels, *LABELS[1:]]))


def test_wrong_arguments_and_inputs() -> None:
    model = built(HEADS)
    with pytest.raises(
        WrongTypeError, match="must be a MultiTaskModel or its configuration, found BertModel. For a cl"
    ):
        MultiTaskCollator(model.encoder)
    with pytest.raises(WrongTypeError, match=r"tokenizer must have a method pad\(\), found str"):
        MultiTaskCollator(model, "bert-base-uncased")
    with pytest.raises(
        WrongTypeError, match="the examples hold no inputs, expected input_ids, pixel_values or the like"
    ):
        MultiTaskCollator(model)([{"labels": {"joy": 1}}])
    with pytest.raises(
        ShapeError, match=r"'input_ids' cannot be stacked: 4 of 4 .* \[\[3\], \[5\].*\(model, tokenizer\)"
    ):
        MultiTaskCollator(model)(examples())
    with pytest.raises(ShapeError, match="'mask' cannot be stacked: 1 of 2 examples have it"):
        MultiTaskCollator(model)([{"ids": [1], "mask": [1]}, {"ids": [2]}])


def test_the_length_is_that_of_the_words() -> None:
    config = MultiTaskConfig(transformers.BertConfig(), {"entities": HeadConfig(3, level="token"), "joy": HeadConfig()})
    example = {"pixel_values": torch.zeros(3, 8), "input_ids": torch.arange(5), "labels": {"entities": [0, 1, 2, 0, 1]}}
    assert MultiTaskCollator(config)([example])["labels"]["entities"].tolist() == [[0, 1, 2, 0, 1]]
