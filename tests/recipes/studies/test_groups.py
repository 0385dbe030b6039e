"""The study of groups: what is learned against slow references, and the command on a small table."""

import json
import warnings

import numpy as np
import pandas
import pytest
import torch
from statsmodels.regression.mixed_linear_model import MixedLM

from recipes.data.groups import GroupRows, group_table, split_groups
from recipes.groups import main
from recipes.methods.methods import METHODS as COMMON
from recipes.studies.groups.fits import Place, effects_of, network_for, train_groups, train_network
from recipes.studies.groups.methods import METHODS, SPACES
from recipes.studies.groups.mixed_model import MOST_SLOPES, GroupLines, fit_mixed_model
from recipes.studies.groups.networks import ColumnPerGroup, NetworkPerGroup, PooledWithIntercepts
from recipes.studies.groups.settings import DECAY_FACTOR
from recipes.studies.study import Cell, Setting
from saliency_reg import SaliencyRegularizer

from ..support.commands import call
from ..support.studies import lines_of, size_of_png, table_rows

NETWORKS = pytest.mark.parametrize("network", [ColumnPerGroup, PooledWithIntercepts, NetworkPerGroup])
VALUES = {
    "version": 1,
    "data": "small",
    "rows": 4,
    "validation_rows": 2,
    "width": 3,
    "epochs": 3,
    "steps_per_epoch": 2,
    "learning_rate": 0.01,
    "weight_decay": 0.5,
    "decay": "constant",
    "penalty": "share",
    "temperature": 1.0,
}


def small_frame(groups=6, rows=12, noise=0.5):
    """Lines whose intercepts and slopes differ a little."""
    generator = np.random.default_rng(0)
    group = np.repeat(np.arange(groups), rows)
    x, z = generator.normal(size=(2, groups * rows))
    level = generator.normal(size=groups)[group]
    slope = 1 + 0.3 * generator.normal(size=groups)[group]
    score = level + slope * x - z + noise * generator.normal(size=groups * rows)
    return pandas.DataFrame({"school": group, "score": score, "x": x, "z": z, "sex": np.where(z > 0, "m", "f")})


@pytest.fixture(scope="module")
def splits():
    table = group_table(small_frame(), "school", "score", ("x", "z"), "it")
    return split_groups(table, rows=4, validation_rows=2, seed=0)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "scores.csv"
    small_frame().to_csv(path, index=False)
    return path


def cell(key, value=0.0, reported=True, seed=0, **values):
    return Cell(Setting("small", "Small", {**VALUES, **values}, (key,), SPACES), METHODS[key], value, seed, reported)


class TestNetworks:
    @NETWORKS
    def test_each_row_is_predicted_for_its_group(self, network):
        torch.manual_seed(0)
        model, inputs = network(2, 5, 3), torch.randn(5, 4, 2)
        found = model(inputs)
        assert found.shape == (5, 4)
        for group, rows in enumerate(inputs):
            for row, value in zip(rows, found[group]):
                assert torch.allclose(model.for_all_groups(row.unsqueeze(0))[0, group], value, atol=1e-6)

    def test_pooled_groups_differ_by_intercepts_alone(self):
        model = PooledWithIntercepts(2, 3, 4)
        with torch.no_grad():
            model.heads["intercepts"].copy_(torch.tensor([0.0, 1.0, 5.0]))
        found = model.for_all_groups(torch.randn(7, 2))
        assert torch.allclose(found - found[:, :1], torch.tensor([0.0, 1.0, 5.0]).expand(7, 3), atol=1e-6)

    def test_networks_of_groups_share_nothing(self):
        model = NetworkPerGroup(2, 3, 4)
        model.for_all_groups(torch.randn(7, 2))[:, 1].sum().backward()
        for weight in model.parameters():
            moved = weight.grad.flatten(1).abs().sum(1) > 0
            assert moved.tolist() == [False, True, False]

    def test_which_method_has_which(self):
        assert {key: network_for(method) for key, method in METHODS.items() if method.parameter} == {
            "single_task": NetworkPerGroup,
            "pooled": PooledWithIntercepts,
            **dict.fromkeys(
                ("hard_sharing", "mean_regularised", *(key for key in METHODS if key.startswith("srdml"))),
                ColumnPerGroup,
            ),
        }


class TestPenalties:
    def test_mean_regularised_is_the_distance_from_the_mean(self):
        """With linear columns the uniform penalty on squared distances is ``2 / (T - 1)`` times it."""
        torch.manual_seed(0)
        model, groups = ColumnPerGroup(2, 5, 3).double(), 5
        method = METHODS["mean_regularised"]
        regularizer = SaliencyRegularizer(
            model, heads="heads", tasks=list("abcde"), strength=1.0, metric=method.metric, relations=method.rule
        )
        model(torch.randn(5, 2, 2, dtype=torch.float64))
        weights = model.heads.weight
        explicit = sum((own - weights.mean(0)).square().sum() for own in weights)
        found = regularizer()
        assert found.item() == pytest.approx(2 / (groups - 1) * explicit.item(), rel=1e-12)
        ours = torch.autograd.grad(found, weights)[0]
        theirs = torch.autograd.grad(2 / (groups - 1) * explicit, weights)[0]
        assert torch.allclose(ours, theirs, rtol=1e-10)

    def test_first_steps_are_those_of_a_loop(self, splits):
        """Hard sharing, row by row: batches have as many rows of each group, and only heads decay."""
        ours, fitted = train_network(cell("hard_sharing", 5.0, epochs=1), splits)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = ColumnPerGroup(2, 6, 3)
        optimizer = torch.optim.AdamW(
            [
                {"params": model.heads.parameters(), "weight_decay": 5.0},
                {"params": model.backbone.parameters(), "weight_decay": 0.0},
            ],
            lr=0.01,
        )
        order = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)).argsort(1)
        for step in range(2):
            loss = 0.0
            for group in range(6):
                for row in order[group, 2 * step : 2 * step + 2].tolist():
                    feature = model.backbone(splits.train.inputs[group, row])
                    output = feature @ model.heads.weight[group] + model.heads.bias[group]
                    loss = loss + (output - splits.train.targets[group, row]) ** 2 / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert fitted.best_epoch == 1
        for name, weight in model.named_parameters():
            assert torch.allclose(weight, ours.get_parameter(name), atol=1e-6), name

    @pytest.mark.parametrize(("rows", "steps"), [(3, 3), (5, 5), (7, 5), (10, 5), (13, 5)])
    def test_steps_of_an_epoch(self, rows, steps, monkeypatch):
        splits = split_groups(
            group_table(small_frame(rows=20), "school", "score", ("x", "z"), "it"),
            rows=rows,
            validation_rows=2,
            seed=0,
        )
        seen = []
        forward = ColumnPerGroup.forward

        def counted(self, inputs):
            seen.append(inputs.shape[1])
            return forward(self, inputs)

        monkeypatch.setattr(ColumnPerGroup, "forward", counted)
        train_network(cell("hard_sharing", epochs=1, steps_per_epoch=5), splits)
        *of_training, _ = seen
        assert (len(of_training), sum(of_training)) == (steps, rows)

    def test_strong_penalty_makes_slopes_alike(self, splits):
        spread = {}
        for key in ("hard_sharing", "srdml"):
            learned, _ = train_network(
                cell(key, 0.0 if key == "hard_sharing" else 10.0, epochs=60, weight_decay=0.0), splits
            )
            with torch.no_grad():
                spread[key] = float(np.std(effects_of(learned, splits.train)["slope"]))
        assert spread["srdml"] < 0.5 * spread["hard_sharing"]

    def test_nothing_stays_attached(self, splits):
        learned, fitted = train_network(cell("srdml", 1.0), splits)
        assert not [module for module in learned.modules() if module._forward_hooks or module._forward_pre_hooks]
        assert len(fitted.relations) == 6


class TestMixedModel:
    def rows(self, width=1):
        frame = small_frame(rows=20)
        inputs = torch.tensor(frame[["x", "z"][:width]].to_numpy()).view(6, 20, width)
        return GroupRows(inputs, torch.tensor(frame["score"].to_numpy()).view(6, 20))

    @pytest.mark.parametrize("width", [1, 2])
    def test_is_the_best_linear_prediction(self, width):
        """Generalised least squares and conditional means by dense matrices, with the variances that were fitted."""
        rows = self.rows(width)
        found = fit_mixed_model(rows, tuple(range(width)))
        assert found.note == "random intercepts and slopes"
        targets = rows.targets.flatten().numpy()
        design = np.column_stack([np.ones(120), rows.inputs.flatten(0, 1).numpy()])
        codes = np.repeat(np.arange(6), 20)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a variance near its bound
            fitted = MixedLM(targets, design, groups=codes, exog_re=design).fit(reml=True, method="lbfgs")
        spread = np.asarray(fitted.cov_re)
        big = np.zeros((120, 6 * (width + 1)))
        for row, group in enumerate(codes):
            big[row, group * (width + 1) : (group + 1) * (width + 1)] = design[row]
        prior = np.kron(np.eye(6), spread)
        total = big @ prior @ big.T + fitted.scale * np.eye(120)
        fixed = np.linalg.solve(design.T @ np.linalg.solve(total, design), design.T @ np.linalg.solve(total, targets))
        random = (prior @ big.T @ np.linalg.solve(total, targets - design @ fixed)).reshape(6, width + 1)
        assert np.allclose(found.intercepts, fixed[0] + random[:, 0], atol=1e-4)
        assert np.allclose(found.weights, fixed[1:] + random[:, 1:], atol=1e-4)

    def test_input_that_is_the_same_within_groups_has_no_random_slope(self):
        rows = self.rows()
        size = torch.arange(6.0, dtype=torch.float64).view(6, 1, 1).expand(6, 20, 1)
        found = fit_mixed_model(GroupRows(torch.cat([rows.inputs, size], dim=2), rows.targets), (0,))
        assert found.weights[:, 1].unique().numel() == 1
        assert found.weights[:, 0].unique().numel() == 6

    def test_many_slopes_are_left_out_and_that_is_told(self):
        torch.manual_seed(0)
        rows = self.rows()
        width = MOST_SLOPES + 1
        inputs = torch.randn(6, 20, width, dtype=torch.float64)
        found = fit_mixed_model(GroupRows(inputs, rows.targets), tuple(range(width)))
        assert found.note == f"random intercepts: {width} inputs vary within groups, too many with slopes"
        assert found.weights.unique(dim=0).shape == (1, width)

    def test_input_that_others_give_is_left_out(self):
        rows = self.rows(2)
        twice = torch.cat([rows.inputs, 2 * rows.inputs[..., :1]], dim=2)
        one, other = fit_mixed_model(rows, (0, 1)), fit_mixed_model(GroupRows(twice, rows.targets), (0, 1, 2))
        assert torch.allclose(one.weights, other.weights[:, :2])
        assert not other.weights[:, 2].any()


def test_effects_are_means_and_slopes():
    torch.manual_seed(0)
    inputs = torch.randn(3, 50, 2)
    weights = torch.tensor([1.0, -2.0])
    rows = GroupRows(inputs, inputs @ weights + 1)
    lines = GroupLines(torch.stack([weights, 2 * weights, -weights]), torch.tensor([1.0, 0.0, 5.0]), "")
    found = effects_of(lines, rows)
    assert found["slope"] == pytest.approx([1, 2, -1], abs=1e-3)
    mean = float((inputs @ weights).mean())
    assert found["mean"] == pytest.approx([1 + mean, 2 * mean, 5 - mean], abs=1e-3)


class TestCells:
    @pytest.fixture
    def place(self, table):
        return Place(None, str(table), "school", "score", ("x", "z"))

    @pytest.mark.parametrize("key", METHODS)
    def test_every_method(self, place, key):
        value: object = {} if METHODS[key].parameter == "" else 1.0
        trial, reported = (train_groups(cell(key, value, given), place).to_dict() for given in (False, True))
        assert trial["validation"] == reported["validation"] < 1
        assert trial["macro"] == {}
        assert "effects" not in trial
        assert "relations" not in trial
        assert ("relations" in reported) is (key in ("srdml", "srdml_default"))
        assert 0 < reported["macro"]["nmse"] < 10
        assert len(reported["effects"]["slope"]) == len(reported["tasks"]) == 6
        json.dumps(reported, allow_nan=False)

    def test_constant_is_the_mean_of_the_group(self, place, splits):
        found = train_groups(cell("constant", {}), place)
        means = splits.train.targets.mean(1)
        error = (means[splits.test_groups] - splits.test_targets).square().mean().item()
        assert found.macro["nmse"] == pytest.approx(error / splits.variance, rel=1e-6)

    def test_other_seeds_keep_no_effects(self, place):
        assert "effects" not in train_groups(cell("hard_sharing", 1.0, seed=1), place).to_dict()


def test_methods_are_the_common_ones():
    for key in set(METHODS) & set(COMMON) - {"mean_regularised"}:  # here as uniform relations, the same for columns
        own, common = METHODS[key], COMMON[key]
        assert (own.label, own.rule, own.metric, own.fixed) == (common.label, common.rule, common.metric, common.fixed)
    assert len(SPACES["weight decay"]) == len(SPACES["share"])


class TestCommand:
    KEYS = ("constant", "hard_sharing", "srdml", "mixed_model")

    def run(self, table, out, *more):
        own = ("--table", table, "--group", "school", "--target", "score")
        few = ("--rows", "4", "--seeds", "2", "--tuning-seeds", "1", "--workers", "1", "--methods", *self.KEYS)
        return call(main, *own, *few, "--out", out, *more)

    def test_tables_pictures_and_nothing_twice(self, table, tmp_path):
        answer = self.run(table, tmp_path)
        assert answer.code == 0, answer.err
        assert "scores-4: 6 of 6 groups have rows enough; 3 inputs" in answer.out
        rows = {row[0]: row for row in table_rows(answer.out)}
        assert set(rows) == {"method", "---", *(METHODS[key].label for key in self.KEYS)}
        assert rows["Mixed model"][1] == "-"
        assert rows["SRDML"][1].startswith("share ")
        assert rows["Hard sharing"][1].startswith("weight decay ")
        assert "Mixed model: random intercepts" in answer.out
        for name in ("errors", "scores-4_shrinkage", "scores-4_relations_srdml"):
            assert min(size_of_png(tmp_path / f"{name}.png")) > 300
        lines = lines_of(tmp_path / "results.jsonl")
        (decay,) = {line["cell"]["weight_decay"] for line in lines if line["cell"]["method"] == "srdml"}
        assert round(decay / DECAY_FACTOR, 9) in SPACES["weight decay"]
        assert not [line for line in lines if line["cell"]["method"] == "pooled" and line["cell"]["reported"]]
        assert len(lines) == 2 * 6 + 4 * 2
        again = self.run(table, tmp_path)
        assert again.code == 0
        assert len(lines_of(tmp_path / "results.jsonl")) == len(lines)

    def test_another_table_has_other_results(self, table, tmp_path):
        self.KEYS, before = ("constant",), self.KEYS
        for scale in (1.0, 2.0):
            path = tmp_path / "scores.csv"
            frame = small_frame()
            frame["x"] *= scale
            frame.to_csv(path, index=False)
            assert self.run(path, tmp_path / "out").code == 0
        self.KEYS = before
        assert len(lines_of(tmp_path / "out" / "results.jsonl")) == 4

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            (("--table", "TABLE", "--target", "score"), "argument --group: needed with --table"),
            (
                ("--table", "TABLE", "--group", "school", "--target", "scores"),
                "has no column 'scores'. Did you mean 'score'",
            ),
            (("--table", "nowhere.csv", "--group", "a", "--target", "b"), "found no file nowhere.csv"),
            (("--group", "school"), "argument --group: of a table of one's own. Add --table FILE"),
            (("--rows", "7"), "argument --rows: of a table of one's own. Add --table FILE"),
            (("--settings", "school-10"), "Add --data with the folder that has the folder school"),
            (
                ("--table", "TABLE", "--group", "school", "--target", "score", "--rows", "9"),
                "fewer than two groups have 9 training, 3 validation and 3 test rows",
            ),
        ],
    )
    def test_what_cannot_go_together(self, table, tmp_path, arguments, complaint):
        given = [str(table) if argument == "TABLE" else argument for argument in arguments]
        answer = call(main, *given, "--out", tmp_path)
        assert answer.code == 2
        assert complaint in answer.complaint
        assert not list(tmp_path.iterdir())
