"""The synthetic recipe: its data, its closed forms, and a tiny run of everything."""

import contextlib
import dataclasses
import io
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from recipes.methods.methods import BASELINE
from recipes.studies.linear_tasks.closed_forms import mean_regularised, pooled, ridge
from recipes.studies.linear_tasks.fits import LinearTasks, train_linear
from recipes.studies.linear_tasks.methods import METHODS, SINGLE_TASK, grids
from recipes.studies.linear_tasks.problem import FACTORS, FEATURES, TASKS, Problem
from recipes.studies.linear_tasks.report import relation_quality, report
from recipes.studies.results_file import ResultsFile
from recipes.studies.study import Cell, Setting, Study
from recipes.synthetic import main
from saliency_reg import SaliencyRegularizer

ROOT = Path(__file__).parents[3]
TINY = ["--trials", "2", "--seeds", "2", "--tuning-seeds", "1", "--steps", "10", "--test", "20", "--workers", "1"]
SHORT = {"steps": 40, "patience": 40, "learning_rate": 0.1}
RULES = ("", "_projected", "_authors", "_uniform")
SHARED = [key for key, method in METHODS.items() if method.shared]


def setting(*keys, trials=12, **values):
    values = {**dataclasses.asdict(Problem()), **SHORT, **values}
    return Setting("synthetic", "Synthetic", values, keys, grids(trials))


def fit(key, value=None, seed=0, reported=True, **values):
    """With the first value of the grid by default."""
    method = METHODS[key]
    return train_linear(
        Cell(setting(key, **values), method, method.grid[0] if value is None else value, seed, reported)
    )


def of_tasks(fitted, name="rmse"):
    return [scores[name] for scores in fitted.scores.values()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder and printed text of one tiny run of everything."""
    out = tmp_path_factory.mktemp("runs")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main([*TINY, "--out", str(out), "--name", "all"]) == 0
    return out / "all", printed.getvalue()


@pytest.fixture
def results(finished):
    """What results.json says of each method."""
    return json.loads((finished[0] / "results.json").read_text(encoding="utf-8"))["settings"]["synthetic"]["methods"]


def table(text, title):
    """The rows of a printed table: columns by label."""
    lines = text.split(f"\n{title}")[1].split("\n\n")[0].splitlines()[2:]
    return {label: columns for label, *columns in (re.split(r"  +", line) for line in lines)}


def _reported(path):
    return path.exists() and '"reported": true' in path.read_text(encoding="utf-8")


class TestData:
    def test_shapes_and_weights(self):
        data = Problem().draw(0)
        assert data.train.inputs.shape == (12, 10, FEATURES)
        assert data.validation.targets.shape == (12, 40)
        assert data.test.targets.shape == (12, 200)
        assert torch.equal(data.weights, torch.tensor(FACTORS).double().unsqueeze(1).expand(12, FEATURES))
        assert len(set(TASKS)) == 12

    def test_inputs_are_around_one_half_with_unit_variance(self):
        inputs = Problem(test=5000).draw(3).test.inputs
        assert inputs.mean() == pytest.approx(0.5, abs=0.01)
        assert inputs.var() == pytest.approx(1.0, abs=0.01)

    @pytest.mark.parametrize("noise", [0.0, 0.01, 0.5])
    def test_truth_has_the_error_of_the_noise(self, noise):
        data = Problem(test=5000, noise=noise).draw(1)
        assert data.test.rmse(data.weights).mean() == pytest.approx(noise, rel=0.02, abs=1e-12)

    def test_own_inputs_differ_and_shared_ones_do_not(self):
        own, shared = Problem().draw(0), Problem(shared_inputs=True).draw(0)
        assert not torch.equal(own.train.inputs[0], own.train.inputs[1])
        assert (shared.train.inputs == shared.train.inputs[0]).all()
        assert torch.equal(own.train.inputs[0], shared.train.inputs[0])
        assert not torch.equal(shared.train.targets[0], shared.train.targets[1]), "twins have noise of their own"
        for name in ("validation", "test"):
            assert torch.equal(getattr(own, name).inputs, getattr(shared, name).inputs)
            assert torch.equal(getattr(own, name).targets, getattr(shared, name).targets)

    def test_seed_decides_everything(self):
        before = torch.get_rng_state()
        one, same, other = (Problem(weights="normal").draw(seed) for seed in (4, 4, 5))
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(one.train.inputs, same.train.inputs)
        assert torch.equal(one.weights, same.weights)
        assert not torch.equal(one.train.inputs, other.train.inputs)
        assert not torch.equal(one.weights, other.weights)
        assert torch.equal(one.weights[0], one.weights[1]), "twins"
        assert torch.equal(Problem().draw(4).train.inputs, one.train.inputs)


class TestClosedForms:
    @pytest.mark.parametrize("solve", [ridge, pooled, mean_regularised])
    def test_gradient_of_the_objective_is_zero(self, solve):
        train, strength = Problem().draw(2).train, 0.3
        weights = solve(train, strength).clone()
        if solve is pooled:
            weights = weights[0].clone()
        weights.requires_grad_()
        predictions = torch.einsum("tnf,tf->tn", train.inputs, weights.expand(12, -1))
        loss = (predictions - train.targets).square().mean(1)
        penalties = {
            ridge: lambda: weights.square().sum(),
            pooled: lambda: weights.square().sum(),
            mean_regularised: lambda: (weights - weights.mean(0)).square().sum(),
        }
        loss = loss.mean() if solve is pooled else loss.sum()
        (gradient,) = torch.autograd.grad(loss + strength * penalties[solve](), weights)
        assert gradient.abs().max() < 1e-9

    def test_directions_that_no_task_sees_stay_zero(self):
        train = Problem(shared_inputs=True).draw(0).train
        weights = mean_regularised(train, 0.1)
        inside = (torch.linalg.pinv(train.inputs) @ train.inputs @ weights.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(weights, inside, atol=1e-6, rtol=0)

    def test_uniform_relations_are_mean_regularised_learning(self):
        """SRDML with squared distances and uniform weights, trained to the end, against the linear system."""
        train, strength, tasks = Problem(train=30).draw(0).train, 2.0, len(TASKS)
        model = nn.Sequential(nn.Linear(FEATURES, tasks, bias=False)).double()
        pairs = tasks * (tasks - 1) / 2
        # sum_t |w_t - mean|^2 = (1 / T) sum_{i<j} |w_i - w_j|^2, and each pair has the weight 1 / pairs.
        regularizer = SaliencyRegularizer(
            model,
            heads="0",
            tasks=TASKS,
            strength=strength * pairs / tasks,
            metric="sqeuclidean",
            relations="fixed",
        )
        inputs = train.inputs.flatten(0, 1)
        optimizer = torch.optim.LBFGS(
            model.parameters(),
            max_iter=500,
            tolerance_grad=1e-10,
            tolerance_change=1e-14,
            line_search_fn="strong_wolfe",
        )

        def closure():
            optimizer.zero_grad()
            outputs = model(inputs).view(tasks, -1, tasks).diagonal(dim1=0, dim2=2)
            loss = (outputs - train.targets.T).square().mean(0).sum() + regularizer()
            loss.backward()
            regularizer.step()
            return loss

        optimizer.step(closure)
        expected = mean_regularised(train, strength)
        torch.testing.assert_close(model[0].weight.detach(), expected, atol=1e-5, rtol=0)

    def test_ridge_takes_a_strength_for_each_task_and_validation_decides(self):
        fitted = fit("single_ridge")
        assert len(fitted.chosen) == 12
        data = Problem().draw(0)
        best = torch.stack([data.validation.rmse(ridge(data.train, 10 ** (k / 4))) for k in range(-24, 13)]).amin(0)
        assert fitted.validation == pytest.approx(-float(best.mean()))
        assert len(fit("pooled").chosen) == 1


class TestTraining:
    @pytest.mark.parametrize(
        "key",
        ["single_task", "srdml", "srdml_sqchordal_authors", "mean_regularised", "pcgrad@parameters", "srdml+pcgrad"],
    )
    def test_same_seed_same_numbers(self, key):
        one, same = (fit(key) for _ in range(2))
        assert one == same
        assert of_tasks(fit(key, seed=1)) != of_tasks(one)

    def test_strength_zero_is_single_task_up_to_the_common_best_step(self):
        short = {"steps": 10, "patience": 10}  # still learning: all best steps are the last
        alone = fit("single_task", {"learning_rate": 0.1}, **short)
        assert set(alone.best_steps) == {10}
        for rule in RULES:
            ours = fit(f"srdml{rule}", {"strength": 0.0}, **short)
            assert ours.best_steps == alone.best_steps
            assert of_tasks(ours) == of_tasks(alone)
        assert of_tasks(fit("srdml", {"strength": 3.0}, **short)) != of_tasks(alone)

    def test_trials_never_see_the_test_samples(self):
        fitted = fit("srdml", reported=False)
        assert fitted.scores == fitted.macro == {}
        assert fitted.validation < 0

    def test_training_ends_when_validation_no_longer_improves(self):
        fitted = fit("srdml_uniform", {"strength": 1000.0}, steps=2000, patience=20)
        assert max(fitted.best_steps) < 300

    def test_errors_in_and_outside_of_the_span(self):
        fitted = fit("single_ridge", noise=0.0)
        assert max(of_tasks(fitted, "error_inside")) < 0.05
        assert min(of_tasks(fitted, "error_outside")) > 0.5
        assert max(of_tasks(fit("single_ridge", train=25), "error_outside")) < 1e-6

    def test_related_tasks_help_with_own_inputs(self):
        ours = fit("srdml_sqchordal", {"strength": 300.0, "temperature": 1.0}, steps=400, patience=250)
        alone = fit("single_task", {"learning_rate": 0.03}, steps=400, patience=250)
        assert sum(of_tasks(ours)) < 0.3 * sum(of_tasks(alone))


class TestSharedLayer:
    def test_weights_are_those_of_the_whole_model(self):
        inputs = torch.randn(7, FEATURES)
        for shared_layer in (False, True):
            model = LinearTasks(shared_layer)
            torch.testing.assert_close(model(inputs), inputs @ model.weights().T)

    def test_surgery_acts_on_the_parameters_and_mgda_at_the_feature_map(self):
        keys = (BASELINE, "pcgrad@parameters", "mgda_ub")
        errors = [of_tasks(fit(key, {"learning_rate": 0.01})) for key in keys]
        for index, one in enumerate(errors):
            assert one not in errors[:index], keys[index]

    @pytest.mark.parametrize("shared_inputs", [False, True])
    @pytest.mark.parametrize(
        ("key", "same", "value"),
        [
            ("pcgrad", BASELINE, {"learning_rate": 0.01}),
            ("srdml+pcgrad", "srdml_shared_layer", {"strength": 10.0, "temperature": 0.5, "learning_rate": 0.1}),
        ],
    )
    def test_at_the_feature_map_nothing_conflicts(self, key, same, value, shared_inputs):
        """Each task has samples of its own: no product of two gradients is anything but zero."""
        ours, theirs = (fit(name, value, shared_inputs=shared_inputs) for name in (key, same))
        assert of_tasks(ours) == of_tasks(theirs)
        assert ours.relations == theirs.relations

    @pytest.mark.parametrize("surgery", ["pcgrad", "pcgrad@parameters"])
    def test_srdml_with_surgery_at_strength_zero_is_that_surgery(self, surgery):
        plain = fit(surgery, {"learning_rate": 0.01})
        ours, other = (fit(f"srdml+{surgery}", {"strength": value, "learning_rate": 0.01}) for value in (0.0, 3.0))
        assert of_tasks(ours) == of_tasks(plain)
        assert of_tasks(other) != of_tasks(plain)

    def test_all_tasks_have_one_best_step(self):
        assert len(set(fit(BASELINE, {"learning_rate": 0.3}).best_steps)) == 1


class TestStudy:
    def test_quality_of_the_true_relations(self):
        factors = torch.tensor(FACTORS).double()
        right = torch.exp(-(factors.unsqueeze(1) - factors).abs() - (factors.unsqueeze(1) * factors < 0).double())
        assert relation_quality(right) == (6, 1.0)
        assert relation_quality(torch.ones(12, 12)) == (0, 0.5)
        assert relation_quality(-right)[1] == 0

    def test_lowest_mean_validation_error_is_chosen(self, tmp_path):
        own = setting("single_task", trials=3, steps=5)
        values = own.spaces["single_task"]
        assert len(values) == 3
        study = Study([own], [0], [8, 9], ResultsFile(tmp_path / "results.jsonl"), METHODS)

        def pretend(cell):
            fitted = train_linear(cell)
            fitted.validation = -0.1 if cell.value == values[1] else -0.2
            return cell, fitted.to_dict(), {}

        *_, (last, _) = study.run(map, pretend)
        assert last == Cell(own, METHODS["single_task"], values[1], 0, reported=True)
        assert study.trainings == study.done == 7

    def test_every_trained_method_has_as_many_trials(self):
        counts = {key: len(grid) for key, grid in grids().items() if len(grid) > 1}
        assert {counts[key] for key in SHARED} == {4}
        assert len(SHARED) == 7
        assert {count for key, count in counts.items() if key not in SHARED} == {12}
        assert len(counts) == 9 + 7
        for grid in grids().values():
            assert all(value not in grid[:index] for index, value in enumerate(grid))
        assert {len(grid) for grid in grids(3).values()} == {1, 3}

    def test_earlier_names_are_known(self):
        by_rule = [
            f"{metric}_{rule}"
            for metric in ("l1", "sqchordal")
            for rule in ("entropic", "projected", "authors", "fixed")
        ]
        shared = ("hard", "pcgrad_feature", "pcgrad_parameters", "mgda_ub", "l1_entropic")
        shared += ("srdml_pcgrad_feature", "srdml_pcgrad_parameters")
        earlier = [
            "single_adam",
            "single_ridge",
            "mean_regularised",
            "pooled",
            *by_rule,
            *(f"shared_{key}" for key in shared),
        ]
        assert [METHODS.name_of(key) for key in earlier] == list(METHODS)[:-1]
        assert not list(METHODS.values())[-1].tuned

    def test_report_of_nothing_and_of_a_part(self, tmp_path):
        own = setting("single_task", "srdml", BASELINE, "pcgrad", trials=1, steps=5)
        study = Study([own], [0, 1], [], ResultsFile(tmp_path / "results.jsonl"), METHODS)
        rows = table("\n" + report(study, tmp_path), "Test, ")
        assert set(map(tuple, rows.values())) == {("0", *"-----")}
        for count, (_, result) in enumerate(study.run(map, lambda cell: (cell, train_linear(cell).to_dict(), {})), 1):
            assert result["macro"]
            text = report(study, tmp_path)
            if count == 1:
                assert "ratio to: Single-task, early stopping" in text
                assert "Relations" not in text
                assert table("\n" + text, "Test, ")["SRDML, l1, entropic"] == ["0", *"-----"]
        assert count == 8
        assert table("\n" + text, "Shared layer: test ") == {
            "Shared layer, PCGrad (feature)": ["2", "+0.000 +- 0.000", "0", "2", "0"]
        }


class TestRun:
    def test_results_json_has_everything(self, finished, results):
        content = json.loads((finished[0] / "results.json").read_text(encoding="utf-8"))
        assert content["schema_version"] == 4
        assert content["status"] == "complete"
        assert not set(content["seeds"]) & set(content["tuning_seeds"])
        assert set(results) == set(METHODS) - {"srdml_default"}
        for key, method in results.items():
            assert len(method["trials"]) == (2 if len(METHODS[key].grid) > 1 else 0)
            assert len(method["per_seed"]) == 2
            values = [result["macro"]["rmse"] for result in method["per_seed"]]
            assert method["summary"]["rmse"]["mean"] == pytest.approx(sum(values) / 2)
            for result in method["per_seed"]:
                assert list(result["scores"]) == list(TASKS)
                of_each = [scores["rmse"] for scores in result["scores"].values()]
                assert result["macro"]["rmse"] == pytest.approx(sum(of_each) / 12)
                assert (result["relations"] is not None) == (METHODS[key].rule is not None)
                if result["relations"]:
                    assert torch.tensor(result["relations"]).triu(1).sum() == pytest.approx(1.0)

    def test_ratio_is_to_the_best_single_task_method(self, finished, results):
        rows = table(finished[1], "Test, ")
        errors = {key: [result["macro"]["rmse"] for result in method["per_seed"]] for key, method in results.items()}
        best = min(SINGLE_TASK, key=lambda key: sum(errors[key]))
        assert f"; ratio to: {METHODS[best].label}:" in finished[1]
        assert rows[METHODS[best].label][2:4] == ["1.000", "1.000"]
        for key, own in errors.items():
            worst = max(ours / theirs for ours, theirs in zip(own, errors[best]))
            assert rows[METHODS[key].label][2] == f"{sum(own) / sum(errors[best]):.3f}"
            assert rows[METHODS[key].label][3] == f"{worst:.3f}"
        assert set(table(finished[1], "Relations, ")) == {
            method.label for method in METHODS.values() if method.rule and method.tuned
        }

    def test_differences_to_hard_sharing_are_paired_by_seed(self, finished, results):
        rows = table(finished[1], "Shared layer: test ")
        assert set(rows) == {METHODS[key].label for key in SHARED} - {METHODS[BASELINE].label}
        errors = {key: [result["macro"]["rmse"] for result in results[key]["per_seed"]] for key in SHARED}
        for key, own in errors.items():
            if key != BASELINE:
                pairs = [ours - theirs for ours, theirs in zip(own, errors[BASELINE])]
                seeds, text, *counts = rows[METHODS[key].label]
                assert seeds == "2"
                assert text.startswith(f"{sum(pairs) / 2:+.3f} +- ")
                assert counts == [
                    str(sum(sign * pair > 0 for pair in pairs) if sign else pairs.count(0)) for sign in (-1, 0, 1)
                ]
                assert results[key]["difference"]["rmse"]["mean"] == pytest.approx(sum(pairs) / 2)
        assert errors["pcgrad"] == errors[BASELINE]
        assert all(ours != theirs for ours, theirs in zip(errors["pcgrad@parameters"], errors[BASELINE]))

    def test_rows_name_the_level_of_surgery(self, finished):
        folder, text = finished
        tables = [
            text.split("### ")[1].split("\n\n")[1],
            (folder / "results.md").read_text(encoding="utf-8").split("### Tuning: ")[1],
            *(text.split(title)[1].split("\n\n")[0] for title in ("\nTest, ", "\nShared layer: test ")),
        ]
        for name in ("PCGrad (feature)", "PCGrad (parameters)", "MGDA-UB"):
            assert all(f"Shared layer, {name} " in own for own in tables)
        for level in ("feature", "parameters"):
            assert all(f"Shared layer, SRDML w/ PCGrad ({level}) " in own for own in tables)
        assert "never conflict" in text

    def test_pictures_and_tables(self, finished, results):
        folder, text = finished
        expected = {"results.jsonl", "results.json", "results.csv", "results.md", "report.html", "panels.png"}
        assert {path.name for path in folder.iterdir()} - {".lock"} == expected
        assert (folder / "panels.png").stat().st_size > 20_000
        for method in results.values():
            rmse = method["summary"]["rmse"]
            assert f"{rmse['mean']:.3f} +- {rmse['std']:.3f}" in text
            assert f"{rmse['mean']:.4f} +- {rmse['std']:.4f}" in text
        assert "each task its own" in text
        assert "AUC same sign" in text

    def test_some_methods_with_shared_inputs(self, tmp_path, capsys):
        arguments = ["--methods", "single_ridge", "pooled", "--shared-inputs", "--weights", "normal", "--seeds", "1"]
        assert main([*TINY, *arguments, "--out", str(tmp_path)]) == 0
        printed = capsys.readouterr().out
        assert "the same for all tasks" in printed
        assert "Relations" not in printed
        assert "Shared layer" not in printed
        assert "a normal vector" in printed
        assert not (tmp_path / "panels.png").exists()

    def test_earlier_names_and_nothing_computed_twice(self, tmp_path, capsys):
        common = [*TINY, "--seeds", "1", "--out", str(tmp_path), "--methods", "single_ridge"]
        assert main([*common, "shared_hard", "l1_entropic", "shared_pcgrad_feature"]) == 0
        assert "Shared layer, PCGrad (feature)" in table(capsys.readouterr().out, "Shared layer: test ")
        before = (tmp_path / "results.jsonl").read_bytes()
        assert main([*common, "hard_sharing", "srdml", "pcgrad"]) == 0
        assert (tmp_path / "results.jsonl").read_bytes() == before
        assert "10 of 10 trainings are done" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "hint"),
        [
            (["--train", "0"], "Pass a whole number from 1 on"),
            (["--noise", "-1"], "Pass a finite number from 0 on"),
            (["--trials", "0"], "Pass a whole number from 1 on"),
            (["--learning-rate", "0"], "Pass a finite number above 0"),
            (["--methods", "ridge"], "Use one of single_task, single_ridge"),
            (["--methods", "single_adam", "single_task"], "Use each value once"),
            (["--methods", "pooled"], "Add single_task or single_ridge"),
            (["--seeds", "1001"], "Use --seeds 1000 or less"),
            (["--weights", "zeros"], "choose from"),
            (["--name", "a/b"], "Pass a plain folder name"),
        ],
    )
    def test_bad_options_say_what_to_type(self, arguments, hint, tmp_path, capsys):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, "--out", str(tmp_path)])
        assert stop.value.code == 2
        assert hint in " ".join(capsys.readouterr().err.split())
        assert not list(tmp_path.iterdir())

    @pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to another process")
    def test_interrupt_leaves_what_is_finished(self, tmp_path):
        command = [
            sys.executable,
            "-m",
            "recipes.synthetic",
            "--methods",
            "single_ridge",
            "srdml",
            "--trials",
            "1",
        ]
        command += ["--tuning-seeds", "1", "--seeds", "900", "--steps", "300", "--workers", "1", "--out", str(tmp_path)]
        process = subprocess.Popen(
            [*command, "--name", "one"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            # A shell that runs the tests in the background lets its children ignore the signal.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        results = tmp_path / "one" / "results.jsonl"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not _reported(results):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        text, _ = process.communicate(timeout=60)
        content = json.loads(results.with_suffix(".json").read_text(encoding="utf-8"))
        assert process.returncode == 130
        assert content["status"] == "interrupted"
        assert 0 < len(content["settings"]["synthetic"]["methods"]["single_ridge"]["per_seed"]) < 900
        assert "from the trainings that were finished" in text
