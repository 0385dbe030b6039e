"""The picture of differences to the baseline."""

from recipes.studies.gains import draw_gains

from ..support.small_study import Trained, in_turn, plain, setting, study
from ..support.studies import size_of_png


def drawn(tmp_path, name, *settings, seeds=3, **options):
    own = study(tmp_path / f"{name}.jsonl", *settings, seeds=seeds)
    list(own.run(in_turn, Trained(plain)))
    draw_gains(own, tmp_path / f"{name}.png", "accuracy", "accuracy above the baseline", **options)
    return tmp_path / f"{name}.png"


def test_a_panel_for_each_setting(tmp_path):
    one = size_of_png(drawn(tmp_path, "one", setting()))
    two = size_of_png(drawn(tmp_path, "two", setting(), setting("two")))
    assert two[0] > one[0] + 300


def test_nothing_to_draw(tmp_path):
    assert not drawn(tmp_path, "baseline", setting(methods=("hard_sharing",))).exists()
    assert not drawn(tmp_path, "no interval of one seed", seeds=1).exists()
    assert not drawn(tmp_path, "left out", leave_out=("srdml",)).exists()
    assert drawn(tmp_path, "some", leave_out=("pcgrad",)).exists()
