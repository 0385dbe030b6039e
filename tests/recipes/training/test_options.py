"""The options of a training: typed errors in Python, and one option of a command line for each."""

import argparse
import dataclasses
import math
import re

import pytest

from recipes import celeba, cifar_mtl, digits, folder, go_emotions
from recipes.runs.command_line import add_options, options_from
from recipes.runtime.errors import OptionError, RecipeError
from recipes.training.options import Options

NAN, INF = math.nan, math.inf
FIELDS = {field.name: field for field in dataclasses.fields(Options)}
IN_COMMANDS = [name for name, field in FIELDS.items() if field.metadata]
WHOLE = (-1, 1.5, "2", True, NAN)
BAD = {
    "epochs": (0, *WHOLE, None),
    "batch_size": (0, *WHOLE, None),
    "learning_rate": (0, -1e-3, NAN, INF, "0.1", True, None),
    "weight_decay": (-0.1, NAN, INF, "0.1", True, None),
    "decay": ("exponential", "", None, 1),
    "warmup_steps": (*WHOLE, None),
    "evaluations": (0, *WHOLE, None),
    "seed": (*WHOLE, None),
    "accumulation": (0, *WHOLE, None),
    "mixed_precision": ("fp8", "", None, True),
    "clip_norm": (0, -1.0, NAN, INF, "1", True),
    "temperature": (0, -1.0, NAN, INF, "1", True),
    "pretraining_epochs": (*WHOLE, None),
    "data_workers": (*WHOLE, None),
    "checkpoint_steps": (*WHOLE, None),
    "keep_checkpoints": (0, *WHOLE),
    "log_steps": WHOLE,
    "evaluation_batch_size": (0, *WHOLE),
}
RECIPES = pytest.mark.parametrize("recipe", [celeba, cifar_mtl, digits, folder, go_emotions])


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_values_are_refused(name, value):
    with pytest.raises(OptionError, match=name) as found:
        Options(**{name: value})
    assert isinstance(found.value, RecipeError)
    assert isinstance(found.value, ValueError)
    assert repr(value) in str(found.value), "what was found"
    if value is None:
        assert "or None" not in str(found.value)


def test_every_option_with_bounds_is_here():
    assert set(IN_COMMANDS) <= set(BAD)


@pytest.mark.parametrize("name", ["clip_norm", "temperature"])
def test_what_need_not_be_given(name):
    assert getattr(Options(**{name: None}), name) is None
    with pytest.raises(OptionError, match="or None"):
        Options(**{name: -1})


def test_edges_are_allowed():
    Options(epochs=1, batch_size=1, learning_rate=1e-300, weight_decay=0, seed=0, log_steps=0, clip_norm=1)


def parser(**defaults):
    made = argparse.ArgumentParser()
    group = made.add_argument_group("all")
    add_options(dict.fromkeys(("steps", "method", "run"), group), **defaults)
    return made


def test_command_line_without_arguments_is_the_defaults():
    assert options_from(parser().parse_args([])) == Options()
    assert options_from(parser(epochs=3, decay="linear").parse_args([])) == Options(epochs=3, decay="linear")


def test_command_line_has_each():
    texts = {"decay": "linear", "mixed_precision": "bf16"}
    given = {
        name: texts.get(name, 3 if isinstance(FIELDS[name].metadata["least"], int) else 0.5) for name in IN_COMMANDS
    }
    arguments = [word for name, value in given.items() for word in ("--" + name.replace("_", "-"), str(value))]
    made = options_from(parser().parse_args([*arguments, "--trackers", "tensorboard"]))
    assert made == Options(**given, trackers=("tensorboard",))


@pytest.mark.parametrize(("name", "value"), [(name, BAD[name][0]) for name in IN_COMMANDS])
def test_command_line_refuses_the_same(name, value, capsys):
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(["--" + name.replace("_", "-"), str(value)])
    assert stop.value.code == 2
    assert f"argument --{name.replace('_', '-')}: " in capsys.readouterr().err


@RECIPES
def test_help_of_recipes_tells_the_defaults(recipe, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        recipe.main(["--help"])
    # One entry for each option: its text may begin on the next line.
    entries = [" ".join(entry.split()) for entry in re.split(r"\n  (?=-)", capsys.readouterr().out)]
    found = {name: [own for own in entries if own.startswith(f"--{name.replace('_', '-')} ")] for name in IN_COMMANDS}
    left_out = {"weight_decay", "decay", "warmup_steps", "evaluations", "seed", "pretraining_epochs"}
    assert {name for name, own in found.items() if not own} == (left_out if recipe is digits else set())
    # Those of GoEmotions depend on its encoder.
    depends = ("epochs", "learning_rate", "weight_decay") if recipe is go_emotions else ()
    for name, own in found.items():
        if own and name not in depends and FIELDS[name].default is not None:
            assert "(default: " in own[0], name
