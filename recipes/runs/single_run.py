"""One training on images, from the command line to the tables and pictures."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saliency_reg.errors import SaliencyRegError
from saliency_reg.integrations.plot import draw_relations, draw_saliency, draw_task_tree
from saliency_reg.integrations.timm import HeadConfig, TimmMultiTaskModel, parameter_groups, task_saliency_maps

from ..data.images.to_show import Picture
from ..data.task_kinds import TaskKind
from ..methods.methods import METHODS
from ..models.small_resnet import register_small_backbone
from ..runtime.errors import RecipeError, need
from ..runtime.figures import new_figure, save
from ..runtime.files import machine, now, versions, write_json
from ..runtime.processes import Ranks, started_ranks
from ..runtime.run_folder import INTERRUPTED, NOT_WRITTEN, open_shared_folder, results_in
from ..runtime.tables import aligned
from ..runtime.termination import TERMINATED, Terminated, listening
from ..training.checkpoints import Checkpoints
from ..training.metrics import METRICS_OF
from ..training.train import PRETRAINING, Data, Outcome, train
from .command_line import method_value, single_run_options
from .image_arguments import check_run_arguments

__all__ = ["Loaded", "main"]

SCHEMA_VERSION = 1
#: Tasks in the saliency picture.
_MOST_COLUMNS = 10


@dataclass(frozen=True)
class Loaded:
    """What a recipe knows once it has read its data.

    Attributes:
        kinds: of the tasks.
        data: from the model, whose transforms it may need, to the splits.
        picture: the same to the images of the saliency picture.
        about: lines on what was found, for the beginning.
        figures: the same as numbers, for the results.
    """

    kinds: Mapping[str, TaskKind]
    data: Callable[[TimmMultiTaskModel], Data]
    picture: Callable[[TimmMultiTaskModel], Picture]
    about: tuple[str, ...] = ()
    figures: Mapping[str, Any] | None = None


def main(
    recipe: str,
    parser: argparse.ArgumentParser,
    load: Callable[[argparse.Namespace], Loaded],
    arguments: Any = None,
) -> int:
    """Read the data, train, write everything, and return the exit code.

    Args:
        recipe: its name.
        parser: with the options of :func:`add_run_arguments` and those of the data.
        load: reads the data, on every process.
        arguments: of the command line.
    """
    for module in ("sklearn", "tqdm", "matplotlib", "accelerate", "timm", "datasets"):
        need(module)
    options = parser.parse_args(arguments)
    check_run_arguments(parser, options)
    register_small_backbone()
    with started_ranks() as state:
        try:
            return _run(recipe, parser, options, load, Ranks(state))
        except (RecipeError, SaliencyRegError) as error:
            print(f"{parser.prog}: error: {_text_of(error)}", file=sys.stderr)
            return 1
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            print(
                f"{parser.prog}: error: a BatchNorm of the backbone saw a single image whose map has one position. Use "
                "another --batch-size, so that no batch (the last one, and each process's part) has one image, or a larger "
                "--image-size.",
                file=sys.stderr,
            )
            return 1
        except KeyboardInterrupt:
            print("\nInterrupted. Run the same command with the --name of the run and --resume auto to go on.")
            return INTERRUPTED


def _run(
    recipe: str,
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    load: Callable[[argparse.Namespace], Loaded],
    ranks: Ranks,
) -> int:
    started = time.monotonic()
    loaded = load(options)
    # Before the folder: what is wrong with the model should leave nothing behind.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(options.seed)
        model = _model(options, loaded.kinds)
    with listening(), open_shared_folder(parser, options, ranks, (recipe, SCHEMA_VERSION)) as folder:
        if ranks.from_main(results_in(folder).get("status") == "complete" if ranks.is_main else None):
            if ranks.is_main:
                print(f"The run in {folder} is complete. Pass another --name to train again.")
            return 0
        results = _Results(recipe, folder, options, loaded, ranks)
        if ranks.from_main(results.of_other_data() if ranks.is_main else None):
            parser.error(f"argument --resume: the run in {folder} was begun with other data. Pass another --name.")
        if ranks.is_main:
            print("\n".join([*loaded.about, f"{METHODS[options.method].label} on {options.backbone}."]), flush=True)
            results.write("running", None)
        try:
            outcome = train(
                lambda: model,
                loaded.data(model),
                METHODS[options.method],
                method_value(options),
                single_run_options(options, channels_last=True),
                folder=folder,
                resume="never" if options.resume == "never" else "auto",
                make_optimizer=_optimizer(options),
                tracked=(recipe, {"method": options.method, "seed": options.seed}) if options.trackers else None,
            )
        except Terminated:
            if ranks.is_main:
                where = f"--out {folder.parent} --name {folder.name}"
                print(f"\nTerminated. To go on, run the same command with {where} --resume auto.", flush=True)
            return TERMINATED
        if ranks.is_main:
            model.save(folder / "model")
            # What outputs mean: numbers are predicted as (label - mean) / spread.
            write_json(folder / "model" / "tasks.json", {task: kind.to_dict() for task, kind in loaded.kinds.items()})
            results.write("complete", outcome)
            for own in (folder, folder / PRETRAINING):
                Checkpoints(own).remove_all()
            not_drawn = results.show(outcome, model)
            print(f"\n{time.monotonic() - started:.0f} s. Written to {folder}: {results.names()}")
            if not_drawn is not None:
                print(f"Not all pictures were drawn: {not_drawn}")
                return NOT_WRITTEN
    return 0


def _text_of(error: Exception) -> str:
    text = str(error)
    if text.startswith("Caught "):  # by a data worker, with its traceback
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return text


def _model(options: argparse.Namespace, kinds: Mapping[str, TaskKind]) -> TimmMultiTaskModel:
    hidden = (options.head_width,) if options.head_width else ()
    head = HeadConfig(hidden=hidden, activation=options.activation)
    return TimmMultiTaskModel(
        options.backbone,
        {task: kind.classes for task, kind in kinds.items()},
        head=head,
        pretrained=options.pretrained,
        checkpoint_path=options.checkpoint_path,
        image_size=options.image_size,
        drop_rate=options.drop_rate,
        drop_path_rate=options.drop_path_rate,
    )


def _optimizer(options: argparse.Namespace) -> Callable[[nn.Module, float, float], torch.optim.Optimizer]:
    def make(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        groups = parameter_groups(
            model,
            learning_rate,
            weight_decay,
            backbone_rate_factor=options.backbone_rate_factor,
            layer_decay=options.layer_decay,
        )
        return torch.optim.AdamW(groups)

    return make


class _Results:
    """Files, tables and pictures of one run."""

    def __init__(self, recipe: str, folder: Path, options: argparse.Namespace, loaded: Loaded, ranks: Ranks) -> None:
        self._recipe = recipe
        self._folder = folder
        self._options = options
        self._loaded = loaded
        self._processes = ranks.size
        self._started = now()

    def write(self, status: str, outcome: Outcome | None) -> None:
        """``results.json``, which ``--resume`` checks."""
        options = {name: value for name, value in vars(self._options).items() if name not in ("out", "name", "resume")}
        content = {
            "schema_version": SCHEMA_VERSION,
            "recipe": self._recipe,
            "status": status,
            "date": self._started,
            "options": options,
            "versions": versions(),
            "machine": machine(),
            "processes": self._processes,
            "kinds": {task: kind.to_dict() for task, kind in self._loaded.kinds.items()},
            "data": dict(self._loaded.figures or {}),
        }
        write_json(self._folder / "results.json", {**content, **(outcome.to_dict() if outcome is not None else {})})

    def of_other_data(self) -> bool:
        """Whether the folder has a run that was begun with other images or labels."""
        before = results_in(self._folder).get("data", {}).get("fingerprint")
        return before is not None and before != (self._loaded.figures or {}).get("fingerprint")

    def show(self, outcome: Outcome, model: TimmMultiTaskModel) -> str | None:
        """Print the table, and draw the pictures; return what went wrong with them, if anything."""
        if outcome.best_epoch:
            print(f"\nBest weights by validation: epoch {outcome.best_epoch}. Test:")
        else:
            print(
                "\nThe model keeps its first weights: no epoch had a validation score. Either outputs were not finite (use "
                "a smaller --learning-rate), or no task has validation labels of two kinds. Test:"
            )
        print(_score_table(outcome))
        try:
            self._draw(outcome, model)
        except (OSError, SaliencyRegError) as error:  # the training is worth more than its pictures
            return str(error)
        return None

    def _draw(self, outcome: Outcome, model: TimmMultiTaskModel) -> None:
        tasks = list(self._loaded.kinds)
        if outcome.relations is not None:
            title = f"Learned relations, {METHODS[self._options.method].label}"
            draw_relations(outcome.relations, tasks, self._folder / "relations.png", title=title)
            draw_task_tree(outcome.relations, tasks, self._folder / "task_tree.png", title=title)
        _draw_curves(self._folder / "learning_curves.png", outcome.curves)
        self._draw_saliency(model, tasks[:_MOST_COLUMNS])

    def _draw_saliency(self, model: TimmMultiTaskModel, tasks: list[str]) -> None:
        picture = self._loaded.picture(model)
        known = list(self._loaded.kinds)
        labels = picture.labels[:, [known.index(task) for task in tasks]]
        # Only binary tasks can be true of an image; -1 is unknown.
        binary = torch.tensor([self._loaded.kinds[task].name == "binary" for task in tasks])
        model.eval()
        maps = task_saliency_maps(model, picture.images.to(next(model.parameters()).device), tasks=tasks, size="image")
        draw_saliency(
            picture.images,
            maps.cpu(),
            tasks,
            self._folder / "saliency.png",
            labels=torch.where(binary & ~torch.isnan(labels), labels, -1.0),
            mean=picture.mean,
            std=picture.std,
            title="Saliency of each task on test images (frame: the task's label is 1)",
        )

    def names(self) -> str:
        return ", ".join(sorted(path.name for path in self._folder.iterdir() if not path.name.startswith(".")))


_TITLES = {"auc": "AUC", "nmse": "nMSE"}


def _score_table(outcome: Outcome) -> str:
    names = [
        name for name in dict.fromkeys(name for own in METRICS_OF.values() for name in own) if name in outcome.macro
    ]

    def cells(own: Mapping[str, float]) -> list[str]:
        return [f"{own[name]:.4f}" if name in own and own[name] == own[name] else "-" for name in names]

    known = (~torch.isnan(outcome.outputs["labels"])).sum(0).tolist()
    rows = [["task", "labels", *(_TITLES.get(name, name) for name in names)]]
    rows += [[task, str(count), *cells(own)] for (task, own), count in zip(outcome.scores.items(), known)]
    rows.append(["mean over the tasks", "", *cells(outcome.macro)])
    notes = (
        ["", "nMSE: mean squared error / variance of the training labels (lower is better)."] if "nmse" in names else []
    )
    return "\n".join([aligned(rows, left=1), *notes])


def _draw_curves(path: Path, curves: Mapping[str, list[float]]) -> None:
    figure, axes = new_figure(5.5, 3.6)
    epochs = curves["epoch"]
    axes.plot(epochs, curves["validation_score"], color="#0072B2", marker="o", markersize=3)
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation score", color="#0072B2")
    right = axes.twinx()
    right.plot(epochs, curves["training_loss"], color="#D55E00", linestyle="--", marker="s", markersize=3)
    right.set_ylabel("training loss, mean over the tasks", color="#D55E00")
    axes.set_title("Mean validation score of the tasks, and training loss")
    save(figure, path)
