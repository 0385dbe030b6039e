"""One training on images, from the command line to the tables and pictures."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

import argparse
import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saliency_reg.errors import SaliencyRegError
from saliency_reg.integrations.timm import HeadConfig, TimmMultiTaskModel, parameter_groups

from ..data.images.to_show import Picture, first_images
from ..data.sources import SampleSource
from ..data.task_kinds import TaskKind
from ..methods.methods import METHODS
from ..models.small_resnet import register_small_backbone
from ..runtime.errors import RecipeError, need
from ..runtime.files import machine, now, versions, write_json
from ..runtime.processes import Ranks, started_ranks
from ..runtime.run_folder import INTERRUPTED, NOT_WRITTEN, RESULTS, open_shared_folder, results_in
from ..runtime.termination import TERMINATED, Terminated, listening
from ..training.checkpoints import Checkpoints
from ..training.train import PRETRAINING, Data, Outcome, train
from .command_line import method_value, single_run_options
from .image_arguments import check_run_arguments
from .image_pictures import draw_training, draw_what_tasks_see
from .model_folder import load_model_folder, save_model_folder
from .score_table import score_text

SCHEMA_VERSION = 1
#: In the folder of a run.
MODEL = "model"


@dataclass(frozen=True)
class Loaded:
    """What a recipe knows once it has read its data.

    Attributes:
        kinds: of the tasks.
        data: from the model, whose transforms it may need, to the splits.
        picture: the same to the images of the saliency picture.
        about: lines on what was found, for the beginning.
        figures: the same as numbers, for the results; ``classes`` has the names of classes.
    """

    kinds: Mapping[str, TaskKind]
    data: Callable[[TimmMultiTaskModel], Data]
    picture: Callable[[TimmMultiTaskModel], Picture]
    about: tuple[str, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)


def loaded_images(
    kinds: Mapping[str, TaskKind],
    split: Callable[[str, Callable[[Any], torch.Tensor]], SampleSource],
    about: tuple[str, ...],
    figures: Mapping[str, Any],
) -> Loaded:
    """For images that the transforms of the model are applied to.

    Args:
        kinds: of the tasks.
        split: from the name of a split and a transform to its images.
        about, figures: as in :class:`Loaded`.
    """

    def data(model: TimmMultiTaskModel) -> Data:
        plain = model.transforms(train=False)
        train_images = split("train", model.transforms(train=True))
        return Data(kinds, train_images, split("validation", plain), split("test", plain))

    def picture(model: TimmMultiTaskModel) -> Picture:
        return first_images(model, split("test", model.transforms(train=False)))

    return Loaded(kinds, data, picture, about, figures)


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
    with started_ranks() as state, plain_warnings():
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


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Within, warnings are one line without the code that gave them."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_: f"Warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def _run(
    recipe: str,
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    load: Callable[[argparse.Namespace], Loaded],
    ranks: Ranks,
) -> int:
    loaded = load(options)
    # Before the folder: what is wrong with the model should leave nothing behind.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(options.seed)
        model = _model(options, loaded.kinds)
    with listening(), open_shared_folder(parser, options, ranks, (recipe, SCHEMA_VERSION)) as folder:
        results = _Results(recipe, folder, options, loaded, ranks)
        before = ranks.from_main(results_in(folder) if ranks.is_main else None)
        if before.get("status") == "complete" and before.get("pictures_drawn", True):
            if ranks.is_main:
                print(f"The run in {folder} is complete. Pass another --name to train again.")
            return 0
        if before.get("data", {}).get("fingerprint") not in (None, loaded.figures.get("fingerprint")):
            parser.error(f"argument --resume: the run in {folder} was begun with other data. Pass another --name.")
        if before.get("status") == "complete":
            return results.draw_again(before) if ranks.is_main else 0
        if ranks.is_main:
            print("\n".join([*loaded.about, f"{METHODS[options.method].label} on {options.backbone}."]), flush=True)
            results.write("running")
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
                print(f"\nTerminated. To go on, run the same command with {results.where}.", flush=True)
            return TERMINATED
        return results.finish(outcome, model) if ranks.is_main else 0


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
        self._clock = time.monotonic()

    def write(self, status: str, outcome: Mapping[str, Any] | None = None) -> None:
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
            "data": dict(self._loaded.figures),
        }
        write_json(self._folder / RESULTS, {**content, **(outcome or {})})

    def finish(self, outcome: Outcome, model: TimmMultiTaskModel) -> int:
        """Print the table before anything is written, since the disk may be full; return the exit code."""
        print(f"\n{score_text(outcome)}", flush=True)
        found = {**outcome.to_dict(), "best_epoch": outcome.best_epoch, "pictures_drawn": False}
        kinds, method = self._loaded.kinds, METHODS[self._options.method].label
        classes = self._loaded.figures.get("classes", {})
        try:
            save_model_folder(self._folder / MODEL, model, kinds, classes, outcome, self._recipe, method)
            self.write("complete", found)
            for own in (self._folder, self._folder / PRETRAINING):
                Checkpoints(own).remove_all()
        except (OSError, SaliencyRegError) as error:
            print(f"\nThe model was not saved: {error}\nTo save it, run the same command with {self.where}.")
            return NOT_WRITTEN
        return self._draw(found["relations"], found["curves"], model)

    def draw_again(self, before: Mapping[str, Any]) -> int:
        """Draw the pictures of a run that was stopped before them; return the exit code."""
        print(f"The run in {self._folder} is complete, but for its pictures.", flush=True)
        return self._draw(before["relations"], before["curves"], load_model_folder(self._folder / MODEL)[0])

    def _draw(self, relations: Any, curves: Mapping[str, Any], model: TimmMultiTaskModel) -> int:
        kinds, problem = self._loaded.kinds, None
        title = f"Learned relations, {METHODS[self._options.method].label}"
        try:
            draw_training(self._folder, title, list(kinds), relations, curves)
            draw_what_tasks_see(self._folder, model, self._loaded.picture(model), kinds)
            write_json(self._folder / RESULTS, {**results_in(self._folder), "pictures_drawn": True})
        except (OSError, SaliencyRegError) as error:  # the training is worth more than its pictures
            problem = error
        names = sorted(path.name for path in self._folder.iterdir() if not path.name.startswith("."))
        print(f"\n{time.monotonic() - self._clock:.0f} s. Written to {self._folder}: {', '.join(names)}")
        if problem is not None:
            print(f"Not all pictures were drawn: {problem}\nTo draw them, run the same command with {self.where}.")
            return NOT_WRITTEN
        return 0

    @property
    def where(self) -> str:
        """What goes on with this run."""
        return f"--out {self._folder.parent} --name {self._folder.name} --resume auto"
