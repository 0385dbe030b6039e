"""Every method of the field on the same data, backbone, seeds and number of trials: does anything beat tuned hard sharing?

Each method tries as many values of the one number that it tunes, chosen on validation splits of seeds that are not reported;
no trial sees a test split. Every result goes into one file as soon as it is there, and is never computed again: stop the
command whenever you like, and run it again to go on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .models.architectures.registry import ARCHITECTURES
from .studies.command import StudyCommand
from .studies.comparison.cells import COMPARED_METHODS, train_compared
from .studies.comparison.data_sets.options import (
    add_data_arguments,
    check_data,
    data_set_at,
    fingerprint_of_place,
    left_out,
    place_of,
    setting_of,
)
from .studies.comparison.data_sets.own_data import OWN, introduction
from .studies.comparison.published import PUBLISHED
from .studies.comparison.report.options import Comparison
from .studies.pictures import draw_study
from .studies.study import Setting, Study
from .studies.trials import count_of


def _settings(options: argparse.Namespace) -> dict[str, Setting]:
    setting = setting_of(options, COMPARED_METHODS)
    return {setting.key: setting}


def _introduction(options: argparse.Namespace) -> str:
    setting = setting_of(options, COMPARED_METHODS)
    values, place = setting.values, place_of(options)
    problem = data_set_at(place).build(values, place.where, 0)
    sizes = [len(own) for own in (problem.train, problem.validation, problem.test)]
    parameters = sum(own.numel() for own in problem.blueprint.backbone().parameters())
    epochs = values["epochs"]
    looks = -(-epochs // max(1, epochs // values["evaluations"]))
    tried = options.trials or count_of(setting.spaces["weight decay"])
    lines = (
        f"{setting.label}: {len(problem.kinds)} tasks; {sizes[0]} training, {sizes[1]} validation and {sizes[2]} test "
        "samples.",
        f"All methods: a backbone of {parameters:,} parameters, AdamW, learning rate {values['learning_rate']:g}, batches "
        f"of {values['batch_size']}, {epochs} epochs; the best epoch by validation, which is looked at "
        f"{looks} times.",
        f"Each method that tunes a value tries {tried}, on {options.tuning_seeds} seed(s) that are not reported: its weight "
        "decay, or with a penalty the strength (SRDML: its share in the losses) at the decay of hard sharing.",
        "Methods on frozen features train twice as long: hard sharing first, then heads.",
    )
    return "\n".join([*([introduction(values, place.where), ""] if place.data == OWN else []), *lines])


def _draw(study: Study, folder: Path | None) -> str:
    draw_study(study, folder)
    (setting,) = study.settings
    reasons = left_out(setting, COMPARED_METHODS)
    unused: dict[str, list[str]] = {}
    for key, why in reasons.items():
        if key not in setting.methods:
            unused.setdefault(why, []).append(key)
    said = "; ".join(f"{', '.join(keys)} ({why})" for why, keys in unused.items())
    return f"Not compared unless named after --methods: {said}." if said else ""


def _comparison(options: argparse.Namespace) -> Comparison:
    published = PUBLISHED.get(options.data)
    return Comparison([] if published is None else [published])


COMMAND = StudyCommand(
    name="compare",
    description=__doc__,
    settings=_settings,
    metrics=("score", "auc", "accuracy", "macro_f1", "precision", "recall", "nmse"),
    compared=("score", "auc", "accuracy", "nmse"),
    judged=("score", "auc", "nmse", "accuracy"),
    train=train_compared,
    place=place_of,
    fingerprint=fingerprint_of_place,
    packages=("torchjd", "pandas"),
    add_arguments=add_data_arguments,
    check=check_data,
    introduction=_introduction,
    draw=_draw,
    methods=COMPARED_METHODS,
    architectures=tuple(ARCHITECTURES),
    comparison=_comparison,
)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
