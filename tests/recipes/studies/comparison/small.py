"""Every data set of the comparison at a size that trains in a moment, on files made here."""

import pandas as pd

from recipes.studies.comparison.cells import COMPARED_METHODS, train_compared
from recipes.studies.comparison.data_sets.options import place_of, setting_of
from recipes.studies.study import Cell

from ...support.emotion_texts import rows
from ...support.small_images import write_celeba, write_cifar, write_tables
from ...support.small_molecules import ENDS

#: By data set: values of a training that takes a moment.
TINY = {
    "digits": ("train_per_class=2", "validation_per_class=2", "epochs=2", "evaluations=2"),
    "cifar_mtl": (
        *("train_images=20", "validation_images=20", "widths=[8,8,8]", "epochs=2", "head_width=4"),
        "batch_size=10",
    ),
    "celeba": (
        *("train_images=20", "validation_images=10", "test_images=10", "widths=[8,8,8]", "epochs=2", "head_width=4"),
        *("image_size=16", "batch_size=10"),
    ),
    "go_emotions": (
        *("train_texts=40", "validation_texts=40", "test_texts=30", "vocabulary=100", "width=32", "epochs=2"),
        *("max_length=8", "batch_size=20", "emotions=4"),
    ),
    "sarcos": ("rows_per_task=4", "validation_rows=30", "widths=[8]", "head_width=4", "epochs=2", "batch_size=14"),
    "school": ("validation_share=0.25", "widths=[8]", "epochs=2", "batch_size=20"),
    "groups": ("widths=[8]", "epochs=1", "rows=20"),
    "tox21": ("bits=64", "labels=4", "widths=[16,8]", "epochs=2", "batch_size=8"),
    "synthetic": ("epochs=4", "evaluations=2", "validation=10", "test=20"),
}


def write_all(folder):
    """A folder with the files of all data sets; returns its path."""
    write_tables(folder)
    write_cifar(folder / "cifar10")
    write_celeba(folder / "celeba")
    (folder / "go_emotions").mkdir()
    for number, (name, count) in enumerate({"train": 120, "validation": 60}.items()):
        rows(count, number).to_parquet(folder / "go_emotions" / f"{name}.parquet")
    molecules = [
        ("C" * length + end, float(kind == "acid"), float(length > 6))
        for length in range(1, 15)
        for kind, end in ENDS.items()
    ]
    table = pd.DataFrame(molecules, columns=["smiles", "acid", "long"])
    table.loc[::7, "long"] = float("nan")
    table.to_parquet(folder / "tox21.parquet")
    return str(folder)


def arguments_of(key, folder, *changes):
    """A command line of :data:`TINY`."""
    place = () if key in ("digits", "groups", "synthetic") else ("--folder", folder)
    return ("--data", key, *place, "--set", *TINY[key], *changes)


def trained(command, key, folder, method, place, *, value=None, seed=0, reported=True, changes=()):
    """The result of one cell."""
    options = command.options_of(arguments_of(key, folder, *changes))
    setting, own = setting_of(options, COMPARED_METHODS), COMPARED_METHODS[method]
    space = setting.space(own)
    cell = Cell(setting, own, space[len(space) // 2] if value is None else value, seed, reported)
    return train_compared(cell, place_of(options), place).to_dict()
