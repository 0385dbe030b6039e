"""A finished study of several methods whose test figures are given."""

from recipes.methods.methods import Method, Methods
from recipes.studies.results_file import ResultsFile
from recipes.studies.study import Study

from .small_study import ABOUT, in_turn, setting


def finished(path, figures, metric="auc", **more):
    """A study with ``{method: figures by seed}``, and per method what else its results have, by seed.

    Args:
        path: of its results.
        figures: of the tests; ``None`` for a training that diverged, fewer than others where seeds are not done.
        metric: which figures they are.
        more: ``costs`` or ``scores``: ``{method: [of each seed]}``.
    """
    methods = Methods()
    for key in figures:
        methods.add(Method(key, f"Method {key}" if key != "hard_sharing" else "Hard sharing"))

    def train(cell):
        key, seed = cell.method.key, cell.seed
        if not cell.reported:
            return cell, {"validation": 0.5, "macro": {}}, ABOUT
        if seed >= len(figures[key]):
            return cell, None, {}
        further = {name: own[key][seed] for name, own in more.items() if key in own}
        return cell, {"validation": 0.5, "macro": {metric: figures[key][seed]}, **further}, ABOUT

    seeds = max(map(len, figures.values()))
    found = Study([setting(methods=tuple(figures))], range(seeds), [1000], ResultsFile(path), methods)
    list(found.run(in_turn, train))
    return found
