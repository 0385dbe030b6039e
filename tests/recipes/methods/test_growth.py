"""Methods that share by relations: what they gather, how they split, and that their controls have the same shape."""

import dataclasses
from collections import Counter

import pytest
import torch

from recipes.data.digits import digit_splits
from recipes.data.task_kinds import BINARY, TaskKind
from recipes.methods.backward import Backward
from recipes.methods.growth import MOST_GROUPS, most_columns, round_epochs
from recipes.methods.methods import METHODS
from recipes.models.architectures.registry import build, parameters_of
from recipes.models.small_networks import small_blueprint
from recipes.runtime.errors import OptionError
from recipes.training.checkpoints import Checkpoints
from recipes.training.objective import MultiTaskObjective
from recipes.training.options import Options
from recipes.training.progress import Progress
from recipes.training.train import Data, train
from tests.support.two_processes import run_on_two_processes

from ..support.small_training import as_rank

SPLITS = digit_splits(0, 10, 10)
BLUEPRINT = small_blueprint(SPLITS.tasks, "gelu")
BRANCHED = [key for key, method in METHODS.items() if method.architecture == "branching"]
#: Of one of ten classes all pairs are alike.
BRANCHED.remove("branch_label_correlation")


def trained(key, *, labels=None, epochs=4, seed=0, folder=None, resume="never", **options):
    method = METHODS[key]
    source = SPLITS.train if labels is None else dataclasses.replace(SPLITS.train, labels=labels)
    return train(
        lambda: build(method.architecture, BLUEPRINT),
        Data(SPLITS.kinds, source, SPLITS.validation, SPLITS.test),
        method,
        0.01,
        Options(epochs=epochs, batch_size=20, learning_rate=5e-3, evaluations=epochs, seed=seed, **options),
        folder=folder,
        resume=resume,
    )


def shape_of(model):
    """How many tasks each column of each stage has, or each group."""
    if hasattr(model, "partitions"):
        return [sorted(map(len, stage)) for stage in model.partitions]
    return sorted(len(tasks) for tasks, _ in model.parts())


class TestPlan:
    @pytest.mark.parametrize("epochs", [2, 3, 5, 30, 100])
    @pytest.mark.parametrize("stages", [2, 3, 4, 12])
    def test_rounds_are_in_the_second_quarter_and_leave_an_epoch(self, epochs, stages):
        columns = most_columns(stages)
        rounds = round_epochs(epochs, len(columns))
        assert len(rounds) == len(columns) == stages - 1, "the first stage is shared by all"
        assert rounds == sorted(rounds)
        assert epochs / 4 <= rounds[0] < epochs / 4 + 1
        assert rounds[-1] < epochs / 2 + 1
        assert rounds[-1] < epochs
        assert columns == sorted(columns, reverse=True)
        assert columns[0] == MOST_GROUPS
        assert columns[-1] >= 2

    def test_one_epoch_is_too_few(self):
        for key in ("branch_tag", "groups_apart", "selective_sharing"):
            with pytest.raises(OptionError, match="epochs=1"):
                trained(key, epochs=1)


class TestBranching:
    def test_begins_as_hard_sharing(self):
        models = []
        for name in ("hard_sharing", "branching"):
            torch.manual_seed(3)
            models.append(build(name, BLUEPRINT).eval())
        one, other = (model(SPLITS.train.inputs) for model in models)
        assert list(one) == list(other) == list(SPLITS.tasks)
        assert all(torch.equal(one[task], other[task]) for task in one)

    @pytest.mark.parametrize("key", BRANCHED)
    def test_the_first_phase_is_hard_sharing_to_the_bit(self, key):
        """A quarter of 8 epochs."""
        plain, branched = (trained(own, epochs=8).curves for own in ("hard_sharing", key))
        for name in ("validation_loss", "training_loss"):
            assert plain[name][:2] == branched[name][:2]
            assert plain[name][2:] != branched[name][2:]

    @pytest.mark.parametrize("key", BRANCHED)
    def test_a_tree_of_three_columns_at_the_top_and_one_at_the_bottom(self, key):
        model = trained(key).model
        assert [len(stage) for stage in model.partitions] == [1, 2, 3]
        one, two, three = (sum(own.numel() for own in stage[0].parameters()) for stage in model.stages)
        heads = sum(own.numel() for own in model.heads.parameters())
        assert parameters_of(model) == one + 2 * two + 3 * three + heads
        weights = [column.state_dict() for column in model.stages[2]]
        assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0]), (
            "trained after the split"
        )

    def test_the_best_weights_are_those_after_the_last_split(self):
        model = build("branching", BLUEPRINT)
        progress, backward = Progress(model, SPLITS.tasks), Backward(model, "heads", SPLITS.tasks, None, None, None, 0)
        progress.update({"epoch": 1.0}, [(0.9, -0.1)], backward)
        model.split(2, [model.tasks[:4], model.tasks[4:]])
        progress.begin_again()
        with torch.no_grad():
            next(model.stages[2][1].parameters()).zero_()
        progress.update({"epoch": 2.0}, [(0.5, -0.5)], backward)  # worse than before the split
        progress.best.restore()
        assert progress.best.epochs == [2]
        assert [len(stage) for stage in model.partitions] == [1, 1, 2]
        assert not next(model.stages[2][1].parameters()).any()

    def test_the_control_has_the_same_shape_and_other_tasks(self):
        several = [
            [trained(key, seed=seed, epochs=2).model for key in ("branch_tag", "branch_random")] for seed in (0, 1)
        ]
        for tag, control in several:
            assert shape_of(tag) == shape_of(control)
            assert parameters_of(tag) == parameters_of(control)
        assert any(tag.partitions != control.partitions for tag, control in several)
        assert several[0][1].partitions != several[1][1].partitions, "each seed permutes in its own way"

    @pytest.mark.parametrize("key", ["branch_tag", "branch_saliency_distance", "selective_sharing"])
    def test_goes_on_from_within_the_first_phase_and_from_behind_it(self, key, tmp_path):
        options = {"epochs": 4, "checkpoint_steps": 3, "keep_checkpoints": 99}
        whole = trained(key, folder=tmp_path / "whole", **options)
        checkpoints = sorted(Checkpoints(tmp_path / "whole", 99).folder.glob("checkpoint-*"))
        for place in (0, len(checkpoints) // 2):
            part = tmp_path / f"part {place}"
            resumed = trained(key, folder=part, resume=checkpoints[place], **options)
            one, other = whole.model.state_dict(), resumed.model.state_dict()
            assert list(one) == list(other)
            assert all(torch.equal(one[name], other[name]) for name in one)


class TestGroups:
    def test_share_nothing_and_have_their_own_best_epochs(self):
        found = trained("groups_apart")
        model = found.model
        assert sorted(task for tasks, _ in model.parts() for task in tasks) == sorted(SPLITS.tasks)
        assert 1 < len(model.parts()) <= MOST_GROUPS
        owners = Counter(id(own) for _, network in model.parts() for own in network.parameters())
        assert set(owners.values()) == {1}
        assert len(found.curves["epoch"]) == 3, "one of 4 epochs went into the relations"
        plain = parameters_of(build("hard_sharing", BLUEPRINT))
        backbone = sum(own.numel() for own in BLUEPRINT.backbone().parameters())
        assert parameters_of(model) == plain + (len(model.parts()) - 1) * backbone

    def test_networks_begin_alike(self):
        torch.manual_seed(3)
        plain = build("hard_sharing", BLUEPRINT)
        torch.manual_seed(3)
        model = build("groups_apart", BLUEPRINT)
        tasks = list(SPLITS.tasks)
        model.part([tasks[::2], tasks[1::2]])
        one, other = plain(SPLITS.train.inputs), model(SPLITS.train.inputs)
        assert all(torch.equal(one[task], other[task]) for task in tasks)
        with pytest.raises(OptionError, match="2 network"):
            model.part([tasks])

    def test_the_control_has_the_same_sizes(self):
        tag, control = (trained(key).model for key in ("groups_apart", "groups_apart_random"))
        assert shape_of(tag) == shape_of(control)
        assert parameters_of(tag) == parameters_of(control)
        assert [tasks for tasks, _ in tag.parts()] != [tasks for tasks, _ in control.parts()]

    def test_pretraining_would_be_thrown_away(self):
        with pytest.raises(OptionError, match="pretraining_epochs=1"):
            trained("groups_apart", pretraining_epochs=1)


class TestSelectiveSharing:
    def test_estimators_begin_alike_and_some_are_shared(self):
        model = trained("selective_sharing").model
        first = [head.get_submodule("1") for head in model.heads]
        assert 1 < len(set(map(id, first))) < len(SPLITS.tasks)
        assert len({id(head.get_submodule("3")) for head in model.heads}) == len(SPLITS.tasks)

    def test_heads_of_one_layer_are_told(self):
        linear = dataclasses.replace(
            BLUEPRINT, head=lambda _: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(512, 1))
        )
        with pytest.raises(OptionError, match="a head of two layers"):
            train(
                lambda: build("hard_sharing", linear),
                Data(SPLITS.kinds, SPLITS.train, SPLITS.validation, None),
                METHODS["selective_sharing"],
                0.0,
                Options(epochs=2),
            )


def on_rank(rank, key):
    as_rank(rank)
    model = trained(key, epochs=4).model
    # No classes of pytest's in what is sent back.
    return getattr(model, "partitions", None), model.state_dict()


@pytest.mark.parametrize("key", ["branch_gradient_cosine", "groups_apart", "selective_sharing"])
def test_two_processes_train_what_one_does(key):
    alone = trained(key, epochs=4).model
    (tree, one), (same_tree, other) = run_on_two_processes(on_rank, key, timeout=300)
    assert tree == same_tree == getattr(alone, "partitions", None)
    for name, value in alone.state_dict().items():
        assert torch.equal(one[name], other[name])
        if not name.startswith("tree."):
            # In float32, by AdamW, which makes much of rounding in gradients next to 0.
            torch.testing.assert_close(one[name], value, rtol=0.05, atol=5e-3)


class TestWhatCannotBe:
    def test_labels_that_are_never_those_of_one_sample(self):
        count, tasks = SPLITS.train.labels.shape
        own = torch.arange(count) % tasks
        labels = torch.full((count, tasks), torch.nan)
        labels[torch.arange(count), own] = SPLITS.train.labels[torch.arange(count), own]
        for key in ("branch_error_cooccurrence", "branch_label_correlation", "branch_tag", "groups_apart"):
            with pytest.raises(OptionError, match="knows nothing"):
                trained(key, labels=labels)
        assert len(trained("branch_saliency_distance", labels=labels).model.partitions[-1]) == 3

    def test_labels_of_classes_are_all_alike(self):
        with pytest.raises(OptionError, match="'label_correlation' says the same"):
            trained("branch_label_correlation")

    def test_two_tasks(self):
        kinds = {task: SPLITS.kinds[task] for task in SPLITS.tasks[:2]}
        blueprint = small_blueprint(list(kinds), "gelu")
        data = dataclasses.replace(SPLITS.train, labels=SPLITS.train.labels[:, :2])
        with pytest.raises(OptionError, match="found 2 tasks"):
            train(
                lambda: build("branching", blueprint),
                Data(kinds, data, data, None),
                METHODS["branch_tag"],
                0.0,
                Options(),
            )


def test_labels_of_numbers_are_in_the_units_of_outputs():
    kinds = {"number": TaskKind("number", mean=3.0, spread=2.0), "yes": BINARY}
    labels = torch.tensor([[5.0, 1.0], [torch.nan, 0.0]])
    found = MultiTaskObjective(kinds).labels((None, labels))
    assert torch.equal(found.nan_to_num(-9), torch.tensor([[1.0, 1.0], [-9.0, 0.0]]))
