"""``python -m recipes.compare`` as users have it: options, what is left out and why, and a run that is killed."""

import argparse
import json
import signal
import sys

import pytest

from recipes.compare import COMMAND, main
from recipes.methods.methods import METHODS
from recipes.models.small_resnet import SMALL_BACKBONE
from recipes.studies.comparison.cells import COMPARED_METHODS
from recipes.studies.comparison.data_sets.options import left_out, setting_of, value_of
from recipes.studies.comparison.data_sets.registry import DATA_SETS
from recipes.studies.trials import Range, count_of

from ...support.commands import call, start, stop
from ...support.studies import lines_of, results_json, results_of, table_rows

DIGITS = (
    *("--set", "train_per_class=3", "validation_per_class=3", "epochs=2", "evaluations=2"),
    *("--seeds", "2", "--tuning-seeds", "1"),
)
METHODS_OF_RUN = ("constant", "hard_sharing", "single_task", "srdml", "pcgrad@parameters")
#: Three trials of each but the constant one, and two seeds.
TRAININGS = 4 * 3 + 5 * 2


def settings(*arguments):
    return setting_of(COMMAND.options_of(arguments), COMPARED_METHODS)


def without_times(path):
    found = results_of(path)
    for result in found.values():
        result["costs"].pop("seconds_per_step", None)
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare")
    return out / "digits", call(main, *DIGITS, "--methods", *METHODS_OF_RUN, "--out", out, "--workers", "1")


class TestRun:
    def test_trains_tunes_and_reports(self, finished):
        folder, answer = finished
        assert answer.code == 0, answer.err
        assert len(results_of(folder / "results.jsonl")) == TRAININGS
        methods = results_json(folder)["settings"]["digits"]["methods"]
        assert list(methods) == list(METHODS_OF_RUN)
        for key, method in methods.items():
            assert len(method["trials"]) == (0 if key == "constant" else 3)
            assert set(method["summary"]) >= {"auc", "accuracy", "precision", "recall"}
            for result in method["per_seed"]:
                assert len(result["scores"]) == 10, "of each task, for delta-m"
        assert {row[0] for row in table_rows(answer.out)[2:]} == {COMPARED_METHODS[key].label for key in METHODS_OF_RUN}
        assert "nMSE" not in answer.out, "digits have none"
        assert (folder / "report.html").exists()

    def test_methods_with_a_penalty_have_the_decay_of_hard_sharing(self, finished):
        folder, _ = finished
        chosen = results_json(folder)["settings"]["digits"]["methods"]["hard_sharing"]["chosen"]
        cells = [line["cell"] for line in lines_of(folder / "results.jsonl")]
        ours = [cell for cell in cells if cell["method"] == "srdml"]
        assert {cell["weight_decay"] for cell in ours} == {chosen}
        assert {cell["parameter"] for cell in ours} == {"share, l1"}

    @pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
    def test_killed_and_resumed_it_is_the_same_cell_for_cell(self, finished, tmp_path):
        command = (*DIGITS, "--methods", *METHODS_OF_RUN, "--out", tmp_path)
        path = tmp_path / "digits" / "results.jsonl"
        process = start("recipes.compare", *command, "--workers", "2")
        answer = stop(process, signal.SIGKILL, lambda: len(lines_of(path)) >= 4, seconds=600)
        assert answer.code == -signal.SIGKILL
        assert 4 <= len(lines_of(path)) < TRAININGS
        assert call(main, *command, "--workers", "1").code == 0
        assert without_times(path) == without_times(finished[0] / "results.jsonl")
        ours, theirs = (results_json(folder)["settings"]["digits"] for folder in (tmp_path / "digits", finished[0]))
        for own, other in zip(ours["methods"].values(), theirs["methods"].values()):
            assert own["summary"] == other["summary"]
            assert own["difference"] == other["difference"]


class TestWhatIsCompared:
    @pytest.mark.parametrize("key", DATA_SETS)
    def test_as_many_trials_of_every_method(self, key):
        folder = () if DATA_SETS[key].needs_data is None else ("--folder", "here")
        setting = settings("--data", key, *folder)
        counts = {count_of(setting.space(COMPARED_METHODS[own])) for own in setting.methods if own != "constant"}
        assert counts <= {0, 3}
        assert {"constant", "hard_sharing", "srdml"} <= set(setting.methods)
        searched = setting.searched(5)
        for own in setting.methods:
            space = searched.space(COMPARED_METHODS[own])
            assert count_of(space) == (5 if isinstance(space, Range) else 0)

    def test_all_of_the_registry_on_digits(self):
        setting = settings()
        unused = left_out(setting, COMPARED_METHODS)
        by_name = {key for key in setting.methods if key.startswith("torchjd:")}
        assert {*setting.methods, *unused} == {"constant", *METHODS, *by_name}
        assert not set(setting.methods) & set(unused)
        assert not any("network" in why or "backward" in why for why in unused.values())

    def test_a_network_for_each_of_very_many_tasks_is_left_out_and_named(self, tmp_path):
        setting = settings("--data", "groups")
        unused = left_out(setting, COMPARED_METHODS)
        assert unused["single_task"] == "a network for each of 160 tasks, above 40"
        assert unused["pcgrad@parameters"] == "a backward pass for each of 160 tasks, above 40"
        assert "pcgrad" in setting.methods
        answer = call(main, "--data", "groups", "--minutes", "0", "--out", tmp_path)
        assert "soft_sharing, merged_single_task (a network for each of 160 tasks, above 40)" in answer.out

    def test_methods_that_share_by_relations_are_named_together(self, tmp_path):
        own = [key for key, method in METHODS.items() if method.by_relations]
        assert not set(own) & set(settings().methods)
        folder = ("--folder", str(tmp_path))
        for arguments, missing in (
            ((), {"branch_label_correlation"}),
            (("--data", "cifar_mtl", *folder), {"branch_label_correlation"}),
            (("--data", "cifar_mtl", *folder, "--set", "tasks=attributes"), set()),
            (("--data", "celeba", *folder), set()),
            (("--data", "tox21", *folder, "--set", "labelled=all"), {"selective_sharing"}),
            (("--data", "tox21", *folder), {*own} - {"branch_saliency_distance"}),
            (("--data", "sarcos", *folder), {*own} - {"branch_saliency_distance", "selective_sharing"}),
            (
                ("--data", "go_emotions", *folder),
                {own for own in own if own.startswith("branch")} | {"selective_sharing"},
            ),
        ):
            options = COMMAND.options_of([*arguments, "--methods", "pcgrad", "relations"])
            assert options.methods == ["hard_sharing", "pcgrad", *(key for key in own if key not in missing)]
        answer = call(main, "--data", "groups", "--methods", "relations", "--minutes", "0", "--out", tmp_path)
        assert answer.code == 2
        assert "a backbone of one layer cannot be cut; no sample has labels of two tasks" in answer.complaint
        answer = call(main, "--methods", "branch_label_correlation", "--minutes", "0", "--out", tmp_path)
        assert answer.code == 2
        assert "one label of each sample is true" in answer.complaint
        answer = call(main, "--minutes", "0", "--out", tmp_path)
        assert "selective_sharing (or together by relations)" in answer.out

    def test_of_large_networks_fewer(self):
        small = settings("--data", "celeba", "--folder", "here")
        assert "single_task" in small.methods
        large = settings("--data", "celeba", "--folder", "here", "--backbone", "vgg16")
        assert "single_task" not in large.methods
        assert large.values["backbone"] == "vgg16"
        assert small.values["backbone"] == SMALL_BACKBONE

    def test_whoever_names_a_method_gets_it(self, tmp_path):
        answer = call(main, "--data", "groups", "--methods", "single_task", "--minutes", "0", "--out", tmp_path)
        assert answer.code == 0, answer.err
        assert "Single-task" in answer.out

    def test_other_data_are_in_another_folder(self):
        options = [COMMAND.options_of(["--data", key]) for key in ("digits", "synthetic")]
        assert [own.results.parent.name for own in options] == ["digits", "synthetic"]
        assert COMMAND.options_of(["--name", "mine"]).results.parent.name == "mine"


class TestOptions:
    @pytest.mark.parametrize(
        ("arguments", "hint"),
        [
            (["--data", "letters"], "choose from"),
            (
                ["--data", "sarcos"],
                "argument --folder: needed for sarcos. Use the folder that has sarcos/train.parquet",
            ),
            (["--backbone", "resnet18"], "argument --backbone: digits has none. Leave it out."),
            (["--data", "sarcos", "--folder", "x", "--encoder", "bert"], "argument --encoder: sarcos has none"),
            (["--folder", "x"], "argument --folder: digits needs none"),
            (["--set", "epochs"], "argument --set: found 'epochs'. Use NAME=VALUE with one of"),
            (["--set", "colour=1"], "argument --set: found 'colour=1'. Use NAME=VALUE with one of"),
            (["--set", "weight_decay=0.3"], "argument --set: found 'weight_decay=0.3'"),
            (["--set", "activation=sine"], "argument --set: activation: found 'sine'. Use one of"),
            (["--set", "decayed=tails"], "argument --set: decayed: found 'tails'. Use one of all, heads."),
            (["--set", "train_per_class=2.5"], "argument --set: train_per_class: found '2.5'. Use a value such as 5."),
            (["--set", "train_per_class=500"], "there are 97 images of the rarest class"),
            (["--methods", "torchjd:"], "TorchJD has no weighting ''. Use one of"),
            (["--set", "data=sarcos"], "argument --set: found 'data=sarcos'"),
            (["--set", "epochs=many"], "argument --set: epochs: found 'many'. Use a value such as 30."),
            (["--set", "epochs=0"], "argument --set: epochs must be a whole number from 1 on; found 0."),
            (["--methods", "srdml_l1"], "Did you mean srdml?"),
        ],
    )
    def test_bad_ones_say_what_to_type(self, arguments, hint, tmp_path):
        answer = call(main, *arguments, "--out", tmp_path)
        assert answer.code in (1, 2)
        assert hint in answer.complaint
        assert "Traceback" not in answer.err

    def test_values_have_the_kind_of_the_default(self):
        assert value_of("relu", "gelu") == "relu"
        assert value_of("false", True) is False
        assert value_of("3", 0.5) == 3
        assert value_of("all", 100) is None
        for text, default in (("1", True), ("true", 1), ("0.5", 1), ("x", 1), ("1", [1]), ("null", 1), ("NaN", 1.0)):
            with pytest.raises(ValueError, match="Use a value such as"):
                value_of(text, default)

    @pytest.mark.parametrize(
        ("epochs", "evaluations", "looks"), [(30, 10, 10), (100, 12, 13), (20, 12, 20), (3, 10, 3)]
    )
    def test_the_introduction_counts_the_looks(self, epochs, evaluations, looks):
        options = COMMAND.options_of(["--set", f"epochs={epochs}", f"evaluations={evaluations}"])
        assert f"which is looked at {looks} times." in COMMAND.introduction(options)
        every = max(1, epochs // evaluations)  # as the training has it
        assert looks == sum(epoch % every == 0 or epoch == epochs for epoch in range(1, epochs + 1))

    def test_groups_of_no_name(self, tmp_path):
        answer = call(main, "--data", "groups", "--folder", "letters", "--out", tmp_path)
        assert answer.code in (1, 2)
        assert "found no groups of the name 'letters'. Use --folder with one of hsb82" in answer.complaint

    def test_values_reach_the_label_and_the_file(self, finished):
        assert json.loads(json.dumps(dict(settings(*DIGITS).values)))["train_per_class"] == 3
        assert settings(*DIGITS).label == "Digits, 3 training images of each class"
        assert isinstance(COMMAND.options_of(DIGITS), argparse.Namespace)
