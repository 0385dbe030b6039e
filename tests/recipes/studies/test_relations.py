"""Which labels belong together: what trainings say when they are put together, and the command from a table to a page."""

import json
import math
import re
import signal
import sys

import pytest
import torch

from recipes.data.task_kinds import BINARY, TaskKind
from recipes.relations import main
from recipes.studies.relations.chance import above_chance, clear_of_chance
from recipes.studies.relations.findings import (
    DEFAULT_VIEW,
    VIEW_NAMES,
    affinity_of,
    findings,
    rank_rows,
    views_of,
)
from recipes.studies.relations.grouping import COST_OF_ALL, cost_of, groups_of, stretched
from saliency_reg import RelationViews, task_groups
from saliency_reg.relatedness.groups import separation_cost
from saliency_reg.relatedness.views import VIEWS

from ..support.commands import ROOT, call, start, stop
from ..support.planted_labels import FEATURES, planted
from ..support.studies import lines_of, size_of_png, table_rows

TASKS = [f"task {place}" for place in range(6)]


def result(seed=0, *, apart=False, known=True, kinds=2):
    """What a training would say of six tasks, each close to those of its kind."""
    generator = torch.Generator().manual_seed(seed)
    noise = 0.05 * torch.rand(6, 6, generator=generator, dtype=torch.float64)
    place = torch.arange(6)
    same = (place.unsqueeze(1) % kinds == place % kinds).double()
    close = (0.8 * same + (noise + noise.T) / 2).fill_diagonal_(1.0)
    views = {name: close.tolist() for name in VIEW_NAMES if name != "saliency_distance"}
    views = {"saliency_distance": (1.2 - close).fill_diagonal_(0.0).tolist(), **views}
    counts = torch.full((6, 6), 40)
    if apart:
        counts[0, 1] = counts[1, 0] = 0
    above = [0.3] * 5 + [None if known else 0.0]
    spread = [0.05] * 5 + [None if known else 0.05]
    chance = {"above": above, "spread": spread, "mean": [0.25, 0.02] if known else [0.01, 0.02]}
    return {
        "tasks": TASKS,
        "views": views,
        "common_labels": counts.tolist(),
        "chance": chance,
        "macro": {"score": 0.75},
        "kept_after": 4,
    }


def noise(seed):
    drawn = torch.rand(6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (drawn + drawn.T).fill_diagonal_(0.0).tolist()


class TestChance:
    def test_against_a_loop_over_orders(self):
        generator = torch.Generator().manual_seed(1)
        labels = (torch.rand(80, 2, generator=generator) > 0.5).float()
        labels[:10, 0] = torch.nan
        outputs = torch.stack([labels[:, 0].nan_to_num() + torch.randn(80, generator=generator), torch.zeros(80)], 1)
        found = above_chance(outputs, labels, {"a": BINARY, "b": BINARY})
        drawn = torch.Generator().manual_seed(0)
        scores = []
        for _ in range(100):
            own = labels[torch.randperm(80, generator=drawn), 0]
            yes, no = outputs[own == 1, 0], outputs[own == 0, 0]
            scores.append(sum(float(one > other) for one in yes for other in no) / (len(yes) * len(no)))
        yes, no = outputs[labels[:, 0] == 1, 0], outputs[labels[:, 0] == 0, 0]
        true = sum(float(one > other) for one in yes for other in no) / (len(yes) * len(no))
        by_chance = torch.tensor(scores, dtype=torch.float64)
        assert found["above"][0] == pytest.approx(true - float(by_chance.mean()), abs=1e-9)
        assert found["spread"][0] == pytest.approx(float(by_chance.std(correction=0)), abs=1e-9)
        assert found["above"][1] == found["spread"][1] == 0, "a constant guess is at chance"

    def test_of_all_kinds(self):
        generator = torch.Generator().manual_seed(0)
        signal_ = torch.randn(200, generator=generator)
        labels = torch.stack([(signal_ > 0).float(), (signal_ > 0).float() + (signal_ > 1), 40 + 3 * signal_], 1)
        good = torch.stack([signal_, -signal_, 0 * signal_, signal_ - 1, signal_], 1)
        kinds = {"a": BINARY, "b": TaskKind("classes", 3), "c": TaskKind("number", mean=40, spread=3)}
        found = above_chance(good, labels, kinds)
        assert all(clear_of_chance([one], [wide]) for one, wide in zip(found["above"], found["spread"]))
        noise = above_chance(torch.randn(200, 5, generator=generator), labels, kinds)
        assert not clear_of_chance(*([value] for value in noise["mean"]))

    def test_several_trainings_say_more(self):
        assert not clear_of_chance([0.05], [0.04])
        assert clear_of_chance([0.05] * 4, [0.04] * 4)
        assert clear_of_chance([0.2, math.nan], [0.04, math.nan])
        assert not clear_of_chance([math.nan], [math.nan])


class TestFindings:
    def test_the_names_of_the_views_are_those_of_the_package(self):
        assert tuple(VIEWS) == VIEW_NAMES

    @pytest.mark.parametrize("view", VIEW_NAMES)
    @pytest.mark.parametrize("kinds", [2, 3])
    def test_groups_of_every_view(self, view, kinds):
        found = findings([result(seed, kinds=kinds) for seed in range(3)], view, None)
        assert {group.tasks for group in found.groups} == {tuple(TASKS[kind::kinds]) for kind in range(kinds)}
        assert found.stability.adjusted_rand == 1
        assert all(group.together == 1 and group.inside > 0.9 > 0.2 > group.outside for group in found.groups)
        assert f"6 labels make {kinds} groups" in found.sentence
        assert "agree on them entirely" in found.sentence
        assert found.clear

    def test_means_and_trajectory_are_over_the_trainings(self):
        each = [views_of(result(seed)) for seed in range(3)]
        found = findings([result(seed) for seed in range(3)], DEFAULT_VIEW, None)
        for name in VIEW_NAMES:
            assert torch.allclose(found.views[name], sum(own[name] for own in each) / 3, atol=1e-12)
            assert torch.equal(found.views.trajectory[name], torch.stack([own[name] for own in each]))
        assert found.trainings == found.comparison.trainings == 3

    def test_nothing_is_known_of_labels_that_are_never_together(self):
        views = views_of(result(apart=True))
        for name in VIEW_NAMES:
            assert bool(views[name][0, 1].isnan()) is (name not in ("saliency_distance", "relation_weights"))
            assert not views[name].diagonal().isnan().any()
        affinity = affinity_of(views, "tag")
        known = views.affinity("tag", fill=0.0)[~views["tag"].isnan() & ~torch.eye(6, dtype=torch.bool)]
        assert float(affinity[0, 1]) == pytest.approx(float(known.mean()))

    def test_at_chance_nothing_can_be_said(self):
        found = findings([result(seed, known=False) for seed in range(3)], DEFAULT_VIEW, None)
        assert not found.says
        assert not found.clear
        assert found.sentence.startswith("Nothing can be said: the model is at chance level")
        assert found.views.at_chance == ("task 5",)

    def test_a_view_that_is_noise_is_not_chosen(self):
        each = [result(seed) for seed in range(3)]
        noisy = [{**own, "views": {**own["views"], "saliency_distance": noise(seed)}} for seed, own in enumerate(each)]
        assert findings(each, None, None).view == "saliency_distance"
        assert findings(noisy, None, None).view == "gradient_cosine"
        assert findings(noisy[:1], None, None).view == "saliency_distance", "one training does not tell"
        for own in noisy:
            own["views"]["label_correlation"] = (torch.eye(6) * 1.1 - 0.1).tolist()
        assert findings(noisy, None, None).view == "saliency_distance", "labels that exclude each other"

    def test_one_training_and_a_given_number(self):
        found = findings([result()], DEFAULT_VIEW, 3)
        assert len(found.groups) == 3
        assert found.stability is None
        assert "One training does not tell" in found.sentence

    def test_trainings_that_contradict_each_other(self):
        found = findings([result(0, kinds=2), result(1, kinds=3)], DEFAULT_VIEW, None)
        assert found.stability.adjusted_rand < 0.4
        assert "hardly agree" in found.sentence
        assert not found.clear
        assert found.says

    def test_rank_rows(self):
        titles, *rows = rank_rows(findings([result(seed) for seed in range(3)], DEFAULT_VIEW, None).comparison)
        assert titles[:3] == ["view", "itself again", "saliency distance"]
        assert len(rows) == 7
        assert rows[0][2] == ""
        assert rows[0][3] == rows[1][2] == "1.00 +- 0.00", "equal but for the sign"


def affinity(kinds, seed, noise=0.3, size=9):
    """Of labels in turns of each kind."""
    place, generator = torch.arange(size), torch.Generator().manual_seed(seed)
    drawn = noise * torch.randn(size, size, generator=generator, dtype=torch.float64)
    same = (place.unsqueeze(1) % kinds == place % kinds).double()
    return stretched(same + (drawn + drawn.T) / 2)


class TestGrouping:
    def test_stretched(self):
        affinity = torch.tensor([[1.0, 0.5, 0.6], [0.5, 1.0, 0.55], [0.6, 0.55, 1.0]])
        assert torch.allclose(stretched(affinity), torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.5], [1.0, 0.5, 1.0]]))
        assert torch.equal(stretched(torch.full((3, 3), 0.4)), torch.ones(3, 3)), "all pairs alike are one group"

    @pytest.mark.parametrize("kinds", [2, 3, 4])
    def test_the_number_is_that_on_which_trainings_agree(self, kinds):
        each = [affinity(kinds, seed) for seed in range(4)]
        tasks = [f"{place}" for place in range(9)]
        groups, stability = groups_of(stretched(sum(each) / 4), each, tasks, None)
        assert groups == tuple(tuple(tasks[kind::kinds]) for kind in range(kinds))
        assert stability.adjusted_rand == 1

    def test_of_noise_trainings_do_not_agree(self):
        for first in range(0, 40, 4):
            each = [affinity(1, first + seed) for seed in range(4)]
            _, stability = groups_of(stretched(sum(each) / 4), each, [f"{place}" for place in range(9)], None)
            assert stability.adjusted_rand < 0.5

    def test_cost_is_that_of_the_package(self):
        own, tasks = affinity(3, 0), [f"{place}" for place in range(9)]
        groups = task_groups(own, tasks, 4)
        numbers = [[int(task) for task in group] for group in groups]
        assert cost_of(own, groups, tasks) == pytest.approx(separation_cost(own, numbers) + COST_OF_ALL * 3 / 8)

    def test_pairs_that_are_all_alike_are_one_group(self):
        groups, _ = groups_of(torch.ones(4, 4), [torch.ones(4, 4)] * 2, list("abcd"), None)
        assert groups == (("a", "b", "c", "d"),)


QUICK = ("--workers", "1", "--seeds", "2", "--set", "epochs=8")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Arguments, folder, answer and true groups of a run on planted labels."""
    folder = tmp_path_factory.mktemp("planted")
    path, truth = planted(folder / "labels.csv")
    arguments = ["--table", str(path), "--features", *FEATURES, *QUICK]
    answer = call(main, *arguments, "--out", folder / "runs")
    assert answer.code == 0, answer.err
    return arguments, folder / "runs" / "labels", answer, truth


def until_how_it_was_made(folder):
    return (folder / "report.html").read_text(encoding="utf-8").partition("How it was made")[0]


class TestCommand:
    def test_three_kinds_of_labels_are_three_groups(self, made):
        _, folder, answer, truth = made
        first = answer.out[answer.out.index("By saliency distance") :].splitlines()[0]
        assert "9 labels make 3 groups" in first
        found = {tuple(group.split(", ")) for group in first.split(": ")[1].partition(". ")[0].split("; ")}
        assert found == truth
        page = (folder / "report.html").read_text(encoding="utf-8")
        assert first in page
        assert set(re.findall(r'(?:src|href)="([^"]{5})', page)) == {"data:"}, "one file, and nothing from elsewhere"
        assert page.count('class="map"') == 8
        assert "{{" not in page

    def test_files_for_other_tools(self, made):
        _, folder, _, truth = made
        views = RelationViews.from_json(folder / "views.json")
        assert {*views.tasks} == {task for group in truth for task in group}
        assert len(views.trajectory["tag"]) == 2
        assert int(views.common_labels.min()) == 144, "of the training samples, each once"
        assert (folder / "views.csv").read_text().startswith("task,other,saliency_distance,")
        assert "<graphml" in (folder / "saliency_distance.graphml").read_text()
        for name in ("views.png", "tree.png", "graph.png"):
            assert min(size_of_png(folder / name)) > 100

    def test_nothing_is_trained_twice_and_groups_can_be_others(self, made):
        arguments, folder, _, _ = made
        before = (folder / "results.jsonl").read_bytes()
        answer = call(
            main, *arguments, "--out", folder.parent, "--view", "label_correlation", "--groups", "2", "--minutes", "0"
        )
        assert answer.code == 0, answer.err
        assert "By label correlation, 9 labels make 2 groups" in answer.out
        assert (folder / "results.jsonl").read_bytes() == before

    @pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
    def test_stopped_and_started_again_it_leaves_the_same(self, made, tmp_path):
        arguments, folder, _, _ = made
        results = tmp_path / "labels" / "results.jsonl"
        process = start("recipes.relations", *arguments, "--out", tmp_path)
        answer = stop(process, signal.SIGTERM, lambda: lines_of(results), seconds=300)
        assert answer.code == 143, answer.err
        answer = call(main, *arguments, "--out", tmp_path)
        assert answer.code == 0, answer.err
        assert len(lines_of(results)) == 2
        assert (tmp_path / "labels" / "views.json").read_text() == (folder / "views.json").read_text()
        assert until_how_it_was_made(tmp_path / "labels") == until_how_it_was_made(folder)
        assert not (tmp_path / "labels" / "trainings").exists()

    def test_labels_that_are_never_together(self, tmp_path):
        path, _ = planted(tmp_path / "labels.csv", rows=300, apart=True)
        answer = call(main, "--table", path, "--features", *FEATURES, *QUICK, "--out", tmp_path)
        assert answer.code == 0, answer.err
        assert "27 pairs were never seen together in one sample" in answer.out
        views = RelationViews.from_json(tmp_path / "labels" / "views.json")
        assert bool(views["gradient_cosine"][0, 3].isnan())
        assert not views["saliency_distance"].isnan().any()

    def test_labels_of_nothing(self, tmp_path):
        path, _ = planted(tmp_path / "labels.csv", learnable=False)
        answer = call(main, "--table", path, "--features", *FEATURES, *QUICK, "--out", tmp_path)
        assert answer.code == 0, answer.err
        assert "Nothing can be said: the model is at chance level" in answer.out
        assert "Nothing can be said" in (tmp_path / "labels" / "report.html").read_text(encoding="utf-8")

    def test_known_data(self, tmp_path):
        arguments = ["--data", "digits", "--quick", "--seeds", "1", "--workers", "1", "--out", tmp_path]
        answer = call(main, *arguments, "--set", "epochs=2", "--groups", "4")
        assert answer.code == 0, answer.err
        assert "50 training, 200 validation" in answer.out
        (line,) = lines_of(tmp_path / "digits" / "results.jsonl")
        assert line["cell"]["epochs"] == 2
        assert json.loads((tmp_path / "digits" / "views.json").read_text())["tasks"] == line["result"]["tasks"]
        assert "0 of 1" in call(main, *arguments, "--minutes", "0").out, "quick: other trainings"


class TestWhatCannotBe:
    @pytest.mark.parametrize(
        ("more", "said"),
        [
            (["--groups", "10"], "--groups: found 10. There are 9 labels"),
            (["--groups", "0"], "whole number from 1 on"),
            (["--view", "cosine"], "invalid choice: 'cosine'"),
            (["--tasks", "cough_0", "rash_0"], "--tasks: found 2. Between two labels"),
            (["--data", "digits"], "--table stands in its place"),
            (["--tasks", "cough_0", "fever", "rash_0"], "fever"),
            (["--set", "methods=1"], "with one of activation"),
            (["--encoder", "small"], "--encoder: own has none"),
            (["--methods", "srdml"], "unrecognized arguments"),
        ],
    )
    def test_in_a_line(self, tmp_path, more, said):
        path, _ = planted(tmp_path / "labels.csv", rows=60)
        answer = call(main, "--table", path, "--features", *FEATURES, *more)
        assert answer.code == 2
        assert said in answer.complaint

    def test_a_table_that_there_is_not(self, tmp_path):
        answer = call(main, "--table", tmp_path / "none.csv", "--features")
        assert answer.code == 2
        assert "none.csv" in answer.complaint


@pytest.mark.parametrize(
    ("data", "changes", "said"),
    [
        ("digits", ["train_per_class=70", "batch_size=40"], "hardly agree"),
        (
            "cifar_mtl",
            [],
            "bird, cat, deer, dog, frog, horse; airplane, automobile, ship, truck. The 3 trainings agree on them",
        ),
        ("go_emotions", ["emotions=28", "train_texts=4000"], "pride and grief 0.77"),
        ("tox21", ["labelled=all", "labels=1500"], "By gradient cosine, 12 labels make 4 groups"),
    ],
)
def test_what_the_docs_say_is_in_the_results(data, changes, said):
    path = ROOT / "docs" / "results" / f"relations_{data}.jsonl"
    answer = call(
        main, "--data", data, *(["--set", *changes] if changes else []), "--minutes", "0", "--results", path,
        *(["--folder", "unused"] if data == "tox21" else []),
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert "3 of 3 trainings are done" in answer.out
    assert said in answer.out
    page = (ROOT / "docs" / "relations.md").read_text(encoding="utf-8")
    printed = table_rows(answer.out)
    again = [row[1] for row in printed if row[0] in ("saliency distance", "gradient cosine", "error kappa", "tag")]
    column = {"digits": 1, "cifar_mtl": 2, "tox21": 3, "go_emotions": 4}[data]
    names = ("saliency distance", "gradient cosine", "error kappa", "TAG")
    told = [row[column] for row in table_rows(page) if len(row) == 5 and row[0] in names]
    assert [cell.partition(":")[0] for cell in told] == again
