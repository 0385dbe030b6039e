"""Pictures of a study."""

import numpy

from recipes.studies.pictures import Curve, draw_conflicts, draw_learning_curves, draw_study

from ..support.small_study import Trained, in_turn, plain, study
from ..support.studies import size_of_png


def test_curves_with_gaps_are_drawn(tmp_path):
    gaps = numpy.array([[0.5, numpy.nan, 1.0]])
    measures = {"training_loss": gaps, "validation_loss": gaps, "validation_score": gaps}
    draw_learning_curves(tmp_path / "two.png", [Curve("A", ("#000000", "-"), [1.0, 2.0, 3.0], measures)])
    both = [Curve(name, ("#000000", "-"), [1.0, 2.0, 3.0], {"conflicts": gaps}) for name in "ab"]
    draw_conflicts(tmp_path / "three.png", both)
    for name in ("two", "three"):
        assert size_of_png(tmp_path / f"{name}.png")


def test_results_of_earlier_versions_have_fewer_curves(tmp_path):
    """Then the loss is that of training; a study without any draws nothing."""

    def train(cell):
        curves = {"epoch": [1.0, 2.0], "training_loss": [0.5, 0.4], "validation_score": [0.7, 0.9]}
        relations = None if cell.method.rule is None else [[0.0, 1.0], [1.0, 0.0]]
        return {**plain(cell), "curves": curves, "scores": {"a": {}, "b": {}}, "relations": relations}

    ours = study(tmp_path / "results.jsonl")
    (tmp_path / "none").mkdir()
    draw_study(ours, tmp_path / "none")
    assert not list((tmp_path / "none").iterdir())
    list(ours.run(in_turn, Trained(train)))
    draw_study(ours, tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"learning_curves.png", "relations_srdml.png"}
