"""A study whose trainings are a formula."""

import math

from recipes.methods.methods import METHODS
from recipes.studies.results_file import ResultsFile
from recipes.studies.study import Setting, Study

GRIDS = {"weight decay": (0.0, 0.5), "strength, l1": (0.01, 0.1), "strength, cosine": (0.3, 1.0)}
BASE, OURS = METHODS["hard_sharing"], METHODS["srdml"]
ABOUT = {"data": "abc", "seconds": 1.0}


def setting(key="one", methods=("hard_sharing", "srdml"), **values):
    return Setting(key, f"Setting {key}", {"key": key, **values}, methods, GRIDS)


class Trained:
    """Trains by a formula, and counts."""

    def __init__(self, formula, until=math.inf):
        self.formula = formula
        self.until = until
        self.cells = []

    def __call__(self, cell):
        if len(self.cells) >= self.until:
            return cell, None, {}
        self.cells.append(cell)
        return cell, self.formula(cell), ABOUT


def plain(cell):
    """Best at weight decay 0.5 and strength 0.01; on test, each seed is worth 0.1."""
    score = 0.5 + (0.2 if cell.value in (0.5, 0.01) else 0.0)
    accuracy = 0.5 + 0.1 * cell.seed + (0.05 * (cell.seed + 1) if cell.method.rule else 0.0)
    return {"validation": score, "macro": {"accuracy": accuracy, "nmse": 2.0} if cell.reported else {}}


def in_turn(train, cells):
    return map(train, cells)


def study(path, *settings, seeds=3, tuning_seeds=2):
    return Study(settings or [setting()], range(seeds), range(1000, 1000 + tuning_seeds), ResultsFile(path))
