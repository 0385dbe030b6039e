"""One training on images; what is around it is in :mod:`recipes.runs.shell`."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

import argparse
import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saliency_reg.integrations.timm import HeadConfig, TimmMultiTaskModel, parameter_groups

from ..data.images.to_show import Picture, first_images
from ..data.sources import SampleSource
from ..data.task_kinds import TaskKind
from ..methods.methods import METHODS
from ..models.small_resnet import register_small_backbone
from ..runtime.errors import DataError, OptionError
from ..runtime.processes import Ranks
from ..training.train import Data, train
from . import shell
from .command_line import method_value, single_run_options
from .image_arguments import check_run_arguments
from .image_pictures import draw_curves, saliency_pictures
from .model_folder import load_model_folder, save_model_folder
from .score_table import score_text


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
    arguments: Sequence[str] | None = None,
) -> int:
    """Read the data, train, write everything, and return the exit code.

    Args:
        recipe: its name.
        parser: with the options of :func:`add_run_arguments` and those of the data.
        load: reads the data, on every process.
        arguments: of the command line.
    """

    def run(options: argparse.Namespace, ranks: Ranks) -> ImageRun:
        del ranks
        return ImageRun(recipe, options, load(options))

    packages = ("sklearn", "tqdm", "matplotlib", "accelerate", "timm", "datasets")
    with plain_warnings():
        return shell.main(recipe, parser, check_run_arguments, run, packages, arguments)


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Within, warnings are one line without the code that gave them."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_: f"Warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


class ImageRun:
    """One model on the tasks of a recipe; a :class:`~recipes.runs.shell.SingleRun`.

    Args:
        recipe: its name.
        options: of the command line.
        loaded: the data.

    Raises:
        SaliencyRegError: a model that cannot be built.
    """

    def __init__(self, recipe: str, options: argparse.Namespace, loaded: Loaded) -> None:
        self._recipe = recipe
        self._options = options
        self._loaded = loaded
        self._method = METHODS[options.method]
        self._found: Mapping[str, Any] | None = None
        self.about = (*loaded.about, f"{self._method.label} on {options.backbone}.")
        self.data = {"data": dict(loaded.figures)}
        self.more = {"kinds": {task: kind.to_dict() for task, kind in loaded.kinds.items()}}
        register_small_backbone()
        # Before the folder: what is wrong with the model should leave nothing behind.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(options.seed)
            self._model = _model(options, loaded.kinds)

    def train(self, folder: Path, resume: str) -> dict[str, Any]:
        """Train, and return the figures of the best epoch by validation.

        Raises:
            Terminated: SIGTERM came; a checkpoint was written.
            RecipeError: images that cannot be read, or options that do not fit the model.
        """
        options = self._options
        try:
            outcome = train(
                lambda: self._model,
                self._loaded.data(self._model),
                self._method,
                method_value(options),
                single_run_options(options, channels_last=True),
                folder=folder,
                resume=resume,
                make_optimizer=_optimizer(options),
                tracked=(self._recipe, {"method": options.method, "seed": options.seed}) if options.trackers else None,
            )
        except DataError as error:
            if not str(error).startswith("Caught "):
                raise
            # By a data worker, with its traceback.
            raise DataError(str(error).strip().splitlines()[-1].partition(": ")[2]) from error
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise OptionError(
                "a BatchNorm of the backbone saw a single image whose map has one position. Use another --batch-size, so "
                "that no batch (the last one, and each process's part) has one image, or a larger --image-size."
            ) from error
        known = (~torch.isnan(outcome.outputs["labels"])).sum(0).tolist()
        counts = dict(zip(self._loaded.kinds, known))
        self._found = {**outcome.to_dict(), "best_epoch": outcome.best_epoch, "test_labels": counts}
        return self._found

    def table(self, found: Mapping[str, Any]) -> str:
        """Scores of each task."""
        return f"\n{score_text(found)}"

    def save(self, folder: Path) -> None:
        """Write all that is needed to predict.

        Raises:
            DataError: the disk is full, or the folder cannot be written.
        """
        assert self._found is not None
        classes = self._loaded.figures.get("classes", {})
        try:
            made_by = f"`python -m recipes.{self._recipe}` with {self._method.label}"
            save_model_folder(folder, self._model, self._loaded.kinds, classes, self._found, made_by)
        except (OSError, ValueError) as error:
            where = f"--out {folder.parent.parent} --name {folder.parent.name} --resume auto"
            raise DataError(
                f"the model was not saved: {error} To save it, run the same command with {where}."
            ) from error

    def pictures(self, found: Mapping[str, Any], folder: Path) -> shell.Pictures:
        """Relations, learning curves, and what each task looks at."""

        def model() -> TimmMultiTaskModel:
            return load_model_folder(folder / "model")[0] if self._found is None else self._model

        return {
            **shell.relation_pictures(found, list(self._loaded.kinds), self._method.label),
            "learning_curves.png": lambda path: draw_curves(path, found["curves"]),
            **saliency_pictures(self._loaded.kinds, model, self._loaded.picture),
        }


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
