"""A table of one's own as a data set of the comparison: images, texts or features, and label columns."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....data.images.in_files import FileImages, as_seen
from ....data.own_rows.features import Features
from ....data.own_rows.rows import Columns, OwnRows, read_rows
from ....data.sources import Examples, Source
from ....data.task_kinds import TaskKind
from ....data.texts.tokens import TokenisedTexts
from ....models.architectures.blueprint import Blueprint
from ....models.small_resnet import NARROW_BACKBONE, SMALL_BACKBONE, register_small_backbone
from ....runtime.errors import need
from ....training.metrics import METRICS_OF
from ..problem import COMMON_VALUES, DataSet, Problem
from .blueprints import blueprint_of, perceptron
from .images import timm_blueprint
from .texts import SMALL, encoder_blueprint

#: The metric of tables with tasks of several kinds: the mean over the tasks of AUC, accuracy, or one minus the nMSE.
SCORE = "score"
#: Optimizer steps of a training, and of one with ``--quick``: so many that 300 rows with 12 labels take 2 cores minutes.
_STEPS = 600
_QUICK_STEPS = {"features": 240, "text": 160, "image": 120}
#: The key of such a data set.
OWN = "own"
#: Names of values that say what is what in a table; others can be chosen.
OF_TABLE = ("inputs", "columns", "label_columns", "kinds", "split_column")
_BATCH_SIZE = 32
_MOST_NAMED = 50
#: Of the rows, where no column gives the splits. Every seed draws others, so that intervals over seeds tell how much a
#: result depends on which rows there happen to be.
_SHARES = {"validation_share": 0.2, "test_share": 0.2}
#: Decoded images are kept in memory up to so many bytes, and read again in every epoch beyond.
_IN_MEMORY = 2**28
#: Where nothing else is chosen. Rates are those of the best hard sharing on 180 training rows, by validation.
_PARTS: dict[str, dict[str, Any]] = {
    "features": {"widths": [64, 64], "head_width": 32, "learning_rate": 3e-3},
    "image": {
        "backbone": SMALL_BACKBONE,
        "pretrained": False,
        "checkpoint_path": None,
        "image_size": None,
        "head_width": 32,
        "learning_rate": 3e-3,
    },
    "text": {
        "encoder": SMALL,
        "vocabulary": 4000,
        "width": 64,
        "layers": 1,
        "max_length": 64,
        "head_width": 32,
        "learning_rate": 5e-3,
    },
}
#: Of a larger backbone with new weights; and of weights that were trained on something else before.
_RATE_OF_LARGE, _RATE_OF_PRETRAINED = 1e-3, {"image": 3e-4, "text": 5e-5}


def own_data_set(
    columns: Columns,
    *,
    quick: bool = False,
    chosen: Mapping[str, Any] | None = None,
) -> DataSet:
    """Read the table, and say how it is learned.

    Args:
        columns: what is what.
        quick: fewer epochs, and a narrower small backbone.
        chosen: values in place of defaults, such as ``backbone`` and ``encoder``; ``None`` for the default.

    Raises:
        DataError: a table that cannot be used.
        SaliencyRegError: a backbone that there is not.
    """
    rows = read_rows(columns)
    own = {name: value for name, value in (chosen or {}).items() if value is not None}
    parts = {**_PARTS[rows.form], **{name: own[name] for name in own if name in _PARTS[rows.form]}}
    if quick and parts.get("backbone") == SMALL_BACKBONE and not {"backbone", "checkpoint_path"} & own.keys():
        parts["backbone"] = NARROW_BACKBONE
    if _pretrained(parts):
        parts["learning_rate"] = _RATE_OF_PRETRAINED[rows.form]
    elif parts.get("backbone", SMALL_BACKBONE) not in (SMALL_BACKBONE, NARROW_BACKBONE):
        parts["learning_rate"] = _RATE_OF_LARGE
    if rows.form == "image":
        parts["image_size"] = parts["image_size"] or _own_size(parts["backbone"])
    train = rows.split(0, **_SHARES)["train"]
    steps = -(-len(train) // _BATCH_SIZE)
    epochs = max(5, min(100, (_QUICK_STEPS[rows.form] if quick else _STEPS) // steps))
    values = {
        **COMMON_VALUES,
        "data": OWN,
        "inputs": rows.form,
        "columns": _named(rows.columns),
        "label_columns": list(rows.kinds),
        # The same labels can be learned as another kind.
        **({"kinds": [kind.name for kind in rows.kinds.values()]} if columns.kind else {}),
        "split_column": columns.split_column,
        **({} if columns.split_column else _SHARES),
        **parts,
        "epochs": epochs,
        "evaluations": min(epochs, 12),
        "batch_size": _BATCH_SIZE,
    }
    values.update({name: own[name] for name in own if name in values})
    metrics, compared = metrics_of(rows.kinds)
    return DataSet(
        OWN,
        Path(columns.table).stem.replace("{", "{{").replace("}", "}}"),
        values,
        tasks=len(rows.kinds),
        build=build,
        fingerprint=fingerprint,
        metrics=metrics,
        compared=compared,
        place=columns,
        parts=tuple(name for name in ("backbone", "encoder") if name in parts),
    )


def build(values: Mapping[str, Any], place: Columns, seed: int) -> Problem:
    """The problem of one seed; a table that has changed in between is another one.

    Args:
        values: of :func:`own_data_set`.
        place: columns of the table.
        seed: of the splits, where no column gives them.
    """
    rows = read_rows(place)
    split = _split(rows, values, seed)
    kinds = rows.kinds_of(split["train"])
    sources, blueprint = _BUILD[rows.form](rows, values, kinds, split)
    return Problem(kinds, sources["train"], sources["validation"], sources["test"], blueprint)


def fingerprint(place: Columns) -> str:
    """Of the rows of a table."""
    return read_rows(place).fingerprint


def metrics_of(kinds: Mapping[str, TaskKind]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Columns of the table, and metrics that are compared: the score of the kind, or :data:`SCORE` of several kinds."""
    names = dict.fromkeys(kind.name for kind in kinds.values())
    columns = tuple(dict.fromkeys(metric for name in names for metric in METRICS_OF[name]))
    scores = tuple(dict.fromkeys(kind.score for kind in kinds.values()))
    if len(names) == 1:
        return (*scores, *(own for own in columns if own not in scores)), scores
    return (SCORE, *columns), (SCORE,)


def introduction(values: Mapping[str, Any], place: Columns) -> str:
    """What was found in the table, and what is compared, for people."""
    rows = read_rows(place)
    sizes = ", ".join(f"{len(own)} {name}" for name, own in _split(rows, values, 0).items())
    drawn = (
        "Each seed draws splits of its own, so that the intervals include which rows there happen to be. What is tuned is "
        "tuned on the validation rows of other draws, the same for all methods."
    )
    given = f"Splits are those of the column {values['split_column']!r}: seeds differ in weights and batches alone."
    lines = [rows.about, f"{sizes} rows. {drawn if rows.rows is None else given}"]
    if metrics_of(rows.kinds)[1] == (SCORE,):
        lines.append(
            "The tasks are of several kinds. Compared is their score: the mean over the tasks of AUC (of yes and no), "
            "accuracy (of classes), or one minus the nMSE (of numbers)."
        )
    if values.get("encoder") == SMALL:
        lines.append(
            "The encoder is small and has new weights, which learn little from few texts: pass a pretrained one after "
            "--encoder, if you have one."
        )
    if rows.form == "image":
        size, new = values["image_size"], "" if _pretrained(values) else ", which begins with new weights"
        lines.append(f"Images become {size}x{size} pixels for {values['backbone']}{new}, without random changes.")
    return "\n".join(lines)


def _split(rows: OwnRows, values: Mapping[str, Any], seed: int) -> Mapping[str, Tensor]:
    return rows.split(seed, values.get("validation_share", 0.0), values.get("test_share", 0.0))


def _named(columns: Sequence[str]) -> list[str]:
    """Their names, or the number of very many, which every result would have to repeat; the fingerprint tells them apart."""
    return list(columns) if len(columns) <= _MOST_NAMED else [f"{len(columns)} columns"]


def _pretrained(parts: Mapping[str, Any]) -> bool:
    return bool(parts.get("pretrained") or parts.get("checkpoint_path") or parts.get("encoder", SMALL) != SMALL)


def _features(
    rows: OwnRows, values: Mapping[str, Any], kinds: Mapping[str, TaskKind], split: Mapping[str, Tensor]
) -> tuple[dict[str, Source], Blueprint]:
    assert isinstance(rows.inputs, Features)
    inputs = rows.inputs.standardised(split["train"])
    widths = (inputs.shape[1], *values["widths"])
    backbone = perceptron(widths, values["activation"])
    sizes = widths[-1], values["head_width"]
    blueprint = blueprint_of(kinds, backbone, *sizes, values["activation"], example=inputs[:1])
    return {name: _examples(inputs, rows.labels, own) for name, own in split.items()}, blueprint


def _texts(
    rows: OwnRows, values: Mapping[str, Any], kinds: Mapping[str, TaskKind], split: Mapping[str, Tensor]
) -> tuple[dict[str, Source], Blueprint]:
    texts = {name: [str(rows.inputs[row]) for row in own.tolist()] for name, own in split.items()}  # type: ignore[index]
    tokenizer, blueprint = encoder_blueprint(values, texts["train"], kinds)
    sources: dict[str, Source] = {
        name: TokenisedTexts(tokenizer, texts[name], rows.labels[own], values["max_length"])
        for name, own in split.items()
    }
    return sources, blueprint


def _images(
    rows: OwnRows, values: Mapping[str, Any], kinds: Mapping[str, TaskKind], split: Mapping[str, Tensor]
) -> tuple[dict[str, Source], Blueprint]:
    paths: tuple[Path, ...] = rows.inputs  # type: ignore[assignment]
    size = values["image_size"]
    sources: dict[str, Source] = {}
    if len(paths) * 3 * size * size * 4 <= _IN_MEMORY:
        pixels = _decoded(paths, values["backbone"], size)
        sources.update({name: _examples(pixels, rows.labels, own) for name, own in split.items()})
    else:
        transform = _transform(values["backbone"], size)
        for name, own in split.items():
            sources[name] = FileImages([paths[row] for row in own.tolist()], rows.labels[own], transform)
    return sources, timm_blueprint(kinds, values)


_BUILD = {"features": _features, "text": _texts, "image": _images}


def _examples(inputs: Tensor, labels: Tensor, rows: Tensor) -> Examples:
    return Examples(inputs[rows], labels[rows], tuple(rows.tolist()))


@functools.lru_cache(maxsize=1)
def _decoded(paths: Sequence[Path], backbone: str, size: int) -> Tensor:
    """``[N, 3, size, size]``, normalised, once for all trainings of a process."""
    transform = _transform(backbone, size)
    found = []
    for path in paths:
        with need("PIL.Image").open(path) as image:
            found.append(transform(as_seen(image)))
    return torch.stack(found)


def _transform(backbone: str, size: int) -> Any:
    """timm's for prediction."""
    return _timm_model(backbone, size).transforms(train=False)


@functools.lru_cache(maxsize=4)
def _own_size(backbone: str) -> int:
    """That the backbone was made for; the larger side."""
    return int(max(_timm_model(backbone, None).image_size))


def _timm_model(backbone: str, size: int | None) -> Any:
    register_small_backbone()
    with torch.random.fork_rng(devices=[]):
        return need("saliency_reg.integrations.timm").TimmMultiTaskModel(backbone, ["any"], image_size=size)
