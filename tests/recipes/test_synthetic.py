"""The synthetic recipe: its data, its closed forms, and a tiny run of everything."""

import contextlib
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from recipes.studies.linear_tasks.closed_forms import mean_regularised, pooled, ridge
from recipes.studies.linear_tasks.fits import Job, LinearTasks, Schedule, fit
from recipes.studies.linear_tasks.methods import METHODS, SHARED_BASELINE, Setting
from recipes.studies.linear_tasks.problem import FACTORS, FEATURES, TASKS, Problem
from recipes.studies.linear_tasks.study import Study, relation_quality
from recipes.synthetic import main
from saliency_reg import SaliencyRegularizer

ROOT = Path(__file__).parents[2]
TINY = ["--trials", "1", "--seeds", "2", "--tuning-seeds", "1", "--steps", "10", "--test", "20", "--workers", "1"]
SHORT = Schedule(steps=40, patience=40, learning_rate=0.1)
RULES = ("entropic", "projected", "authors", "fixed")


def job(key, setting=None, seed=0, reported=True):
    method = METHODS[key]
    return Job(method, setting or (method.settings or (Setting(),))[0], seed, reported)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder and printed text of one tiny run of everything."""
    out = tmp_path_factory.mktemp("runs")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main([*TINY, "--out", str(out), "--name", "all"]) == 0
    return out / "all", printed.getvalue()


def _reported(path):
    return path.exists() and json.loads(path.read_text(encoding="utf-8"))["methods"]["single_ridge"]["per_seed"]


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
        one, same, other = (Problem(base="normal").draw(seed) for seed in (4, 4, 5))
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
        fitted = fit(job("single_ridge"), Problem(), SHORT)
        assert len(fitted.chosen) == 12
        data = Problem().draw(0)
        best = torch.stack([data.validation.rmse(ridge(data.train, 10 ** (k / 4))) for k in range(-24, 13)]).amin(0)
        assert fitted.validation_rmse == pytest.approx(float(best.mean()))
        assert len(fit(job("pooled"), Problem(), SHORT).chosen) == 1


class TestTraining:
    @pytest.mark.parametrize(
        "key",
        [
            "single_adam",
            "l1_entropic",
            "sqchordal_authors",
            "mean_regularised",
            "shared_pcgrad_parameters",
            "shared_srdml_pcgrad_feature",
        ],
    )
    def test_same_seed_same_numbers(self, key):
        one, same = (fit(job(key), Problem(), SHORT) for _ in range(2))
        assert one == same
        assert fit(job(key, seed=1), Problem(), SHORT).test_rmse != one.test_rmse

    def test_strength_zero_is_single_task_up_to_the_common_best_step(self):
        schedule = Schedule(steps=10, patience=10, learning_rate=0.1)  # still learning: all best steps are the last
        alone = fit(job("single_adam", Setting(learning_rate=0.1)), Problem(), schedule)
        assert set(alone.best_steps) == {10}
        for rule in RULES:
            ours = fit(job(f"l1_{rule}", Setting(strength=0.0)), Problem(), schedule)
            assert ours.best_steps == alone.best_steps
            assert ours.test_rmse == alone.test_rmse
        other = fit(job("l1_entropic", Setting(strength=3.0)), Problem(), schedule)
        assert other.test_rmse != alone.test_rmse

    def test_trials_never_see_the_test_samples(self):
        fitted = fit(job("l1_entropic", reported=False), Problem(), SHORT)
        assert fitted.test_rmse == []
        assert fitted.validation_rmse > 0

    def test_training_ends_when_validation_no_longer_improves(self):
        schedule = Schedule(steps=2000, patience=20, learning_rate=0.1)
        fitted = fit(job("l1_fixed", Setting(strength=1000.0)), Problem(), schedule)
        assert max(fitted.best_steps) < 300

    def test_errors_in_and_outside_of_the_span(self):
        fitted = fit(job("single_ridge"), Problem(noise=0.0), SHORT)
        assert max(fitted.error_inside) < 0.05
        assert min(fitted.error_outside) > 0.5
        enough = fit(job("single_ridge"), Problem(train=25), SHORT)
        assert max(enough.error_outside) < 1e-6

    def test_related_tasks_help_with_own_inputs(self):
        setting = Setting(strength=300.0, temperature=1.0)
        schedule = Schedule(steps=400)
        ours = fit(job("sqchordal_entropic", setting), Problem(), schedule)
        alone = fit(job("single_adam", Setting(learning_rate=0.03)), Problem(), schedule)
        assert sum(ours.test_rmse) < 0.3 * sum(alone.test_rmse)


class TestSharedLayer:
    def test_weights_are_those_of_the_whole_model(self):
        inputs = torch.randn(7, FEATURES)
        for shared_layer in (False, True):
            model = LinearTasks(shared_layer)
            torch.testing.assert_close(model(inputs), inputs @ model.weights().T)

    def test_surgery_acts_on_the_parameters_and_mgda_at_the_feature_map(self):
        setting = Setting(learning_rate=0.01)
        keys = (SHARED_BASELINE, "shared_pcgrad_parameters", "shared_mgda_ub")
        errors = [fit(job(key, setting), Problem(), SHORT).test_rmse for key in keys]
        for index, one in enumerate(errors):
            assert one not in errors[:index], keys[index]

    @pytest.mark.parametrize("shared_inputs", [False, True])
    @pytest.mark.parametrize(
        ("key", "same", "setting"),
        [
            ("shared_pcgrad_feature", SHARED_BASELINE, Setting(learning_rate=0.01)),
            ("shared_srdml_pcgrad_feature", "shared_l1_entropic", Setting(10.0, temperature=0.5, learning_rate=0.1)),
        ],
    )
    def test_at_the_feature_map_nothing_conflicts(self, key, same, setting, shared_inputs):
        """Each task has samples of its own: no product of two gradients is anything but zero."""
        problem = Problem(shared_inputs=shared_inputs)
        ours, theirs = (fit(job(name, setting), problem, SHORT) for name in (key, same))
        assert ours.test_rmse == theirs.test_rmse
        assert ours.relations == theirs.relations

    @pytest.mark.parametrize("level", ["feature", "parameters"])
    def test_srdml_with_surgery_at_strength_zero_is_that_surgery(self, level):
        plain = fit(job(f"shared_pcgrad_{level}", Setting(learning_rate=0.01)), Problem(), SHORT)
        ours = fit(job(f"shared_srdml_pcgrad_{level}", Setting(0.0, learning_rate=0.01)), Problem(), SHORT)
        other = fit(job(f"shared_srdml_pcgrad_{level}", Setting(3.0, learning_rate=0.01)), Problem(), SHORT)
        assert ours.test_rmse == plain.test_rmse
        assert other.test_rmse != plain.test_rmse

    def test_all_tasks_have_one_best_step(self):
        fitted = fit(job(SHARED_BASELINE, Setting(learning_rate=0.3)), Problem(), SHORT)
        assert len(set(fitted.best_steps)) == 1


class TestStudy:
    def test_quality_of_the_true_relations(self):
        factors = torch.tensor(FACTORS).double()
        right = torch.exp(-(factors.unsqueeze(1) - factors).abs() - (factors.unsqueeze(1) * factors < 0).double())
        assert relation_quality(right) == {"twins_on_top": 6, "same_base_auc": 1.0}
        assert relation_quality(torch.ones(12, 12)) == {"twins_on_top": 0, "same_base_auc": 0.5}
        assert relation_quality(-right)["same_base_auc"] == 0

    def test_lowest_mean_validation_error_is_chosen(self):
        method = METHODS["single_adam"]
        study = Study([method], 3, [8, 9], [0])
        settings = list(study.trials[method.key])
        assert len(settings) == 3

        def pretend(jobs):
            for wanted in jobs:
                fitted = fit(wanted, Problem(), Schedule(5, 5, 0.1))
                fitted.validation_rmse = 0.1 if wanted.setting == settings[1] else 0.2
                yield fitted

        *_, last = study.run(pretend)
        assert last.job == Job(method, settings[1], 0, reported=True)
        assert study.trainings == 7

    def test_every_trained_method_has_as_many_trials(self):
        counts = {key: len(method.settings) for key, method in METHODS.items() if method.settings}
        shared = {key: count for key, count in counts.items() if METHODS[key].shared_layer}
        assert set(shared.values()) == {4}
        assert len(shared) == 7
        assert {count for key, count in counts.items() if key not in shared} == {12}
        assert len(counts) == 9 + 7
        for method in METHODS.values():
            assert len(set(method.settings)) == len(method.settings)


class TestRun:
    def test_results_json_has_everything(self, finished):
        content = json.loads((finished[0] / "results.json").read_text(encoding="utf-8"))
        assert content["schema_version"] == 2
        assert content["status"] == "complete"
        assert content["tasks"] == list(TASKS)
        assert not set(content["seeds"]) & set(content["tuning_seeds"])
        assert set(content["methods"]) == set(METHODS)
        single = content["methods"][content["best_single_task"]]["summary"]["rmse"]["mean"]
        for key, method in content["methods"].items():
            assert len(method["tuning"]["trials"]) == bool(METHODS[key].settings)
            values = [result["rmse"] for result in method["per_seed"]]
            assert method["summary"]["rmse"]["mean"] == pytest.approx(sum(values) / 2)
            assert method["summary"]["ratio"] == pytest.approx(sum(values) / 2 / single)
            assert method["per_seed"][0]["rmse"] == pytest.approx(sum(method["per_seed"][0]["rmse_per_task"]) / 12)
        assert content["methods"][content["best_single_task"]]["summary"]["ratio"] == 1
        assert set(content["relations"]) == {key for key, method in METHODS.items() if method.rule}
        for relations in content["relations"].values():
            assert torch.tensor(relations["mean"]).triu(1).sum() == pytest.approx(1.0)

    def test_differences_to_hard_sharing_are_paired_by_seed(self, finished):
        content = json.loads((finished[0] / "results.json").read_text(encoding="utf-8"))
        differences = content["difference_to_shared_hard_sharing"]
        assert set(differences) == {key for key in METHODS if key.startswith("shared_")} - {SHARED_BASELINE}
        errors = {
            key: [result["rmse"] for result in content["methods"][key]["per_seed"]]
            for key in (SHARED_BASELINE, *differences)
        }
        for key, difference in differences.items():
            assert difference["seeds"] == [0, 1]
            expected = [ours - theirs for ours, theirs in zip(errors[key], errors[SHARED_BASELINE])]
            assert difference["per_seed"] == pytest.approx(expected)
            assert difference["summary"]["mean"] == pytest.approx(sum(expected) / 2)
        assert differences["shared_pcgrad_feature"]["per_seed"] == [0, 0]
        assert all(differences["shared_pcgrad_parameters"]["per_seed"])

    def test_rows_name_the_level_of_surgery(self, finished):
        text = finished[1]
        tables = [
            text.split(title)[1].split("\n\n")[0] for title in ("\nTuning, ", "\nTest, ", "\nShared layer: test ")
        ]
        for name in ("PCGrad", "SRDML w/ PCGrad"):
            for level in ("feature", "parameters"):
                assert all(f"\nShared layer, {name} ({level}) " in table for table in tables)
        assert all("\nShared layer, MGDA-UB " in table for table in tables)
        assert "never conflict" in text

    def test_picture_and_table(self, finished):
        folder, text = finished
        assert {path.name for path in folder.iterdir()} == {"results.json", "panels.png"}
        assert (folder / "panels.png").stat().st_size > 20_000
        for method in json.loads((folder / "results.json").read_text(encoding="utf-8"))["methods"].values():
            rmse = method["summary"]["rmse"]
            assert f"{rmse['mean']:.3f} +- {rmse['std']:.3f}" in text
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
        (folder,) = tmp_path.iterdir()
        assert {path.name for path in folder.iterdir()} == {"results.json"}

    @pytest.mark.parametrize(
        ("arguments", "hint"),
        [
            (["--train", "0"], "Pass a whole number from 1 on"),
            (["--noise", "-1"], "Pass a finite number from 0 on"),
            (["--learning-rate", "0"], "Pass a finite number above 0"),
            (["--methods", "ridge"], "choose from"),
            (["--methods", "pooled", "pooled"], "Use each method once"),
            (["--methods", "pooled"], "Add single_adam or single_ridge"),
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

    def test_name_that_is_taken(self, tmp_path, capsys):
        (tmp_path / "mine").mkdir()
        with pytest.raises(SystemExit):
            main(["--out", str(tmp_path), "--name", "mine"])
        assert "Pass another --name" in capsys.readouterr().err

    @pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to another process")
    def test_interrupt_leaves_what_is_finished(self, tmp_path):
        command = [
            sys.executable,
            "-m",
            "recipes.synthetic",
            "--methods",
            "single_ridge",
            "l1_entropic",
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
        results = tmp_path / "one" / "results.json"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not _reported(results):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        text, _ = process.communicate(timeout=60)
        content = json.loads(results.read_text(encoding="utf-8"))
        assert process.returncode == 130
        assert content["status"] == "interrupted"
        assert 0 < len(content["methods"]["single_ridge"]["per_seed"]) < 900
        assert "from the trainings that were finished" in text
