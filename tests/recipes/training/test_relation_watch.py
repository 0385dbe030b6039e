"""Relations that a training shows: of which moment they are kept, and what a resumed training keeps."""

import math
import shutil

import pytest
import torch
from torch import nn

from recipes.data.digits import digit_splits
from recipes.data.task_kinds import BINARY, TaskKind
from recipes.methods.methods import METHODS
from recipes.models.architectures.registry import build
from recipes.models.small_networks import small_blueprint
from recipes.training.checkpoints import Checkpoints
from recipes.training.options import Options
from recipes.training.relation_watch import RelationWatch
from recipes.training.train import Data, train
from saliency_reg import RelationViews, SaliencyRegularizer, relation_report


def small(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    return model, SaliencyRegularizer(model, heads="2", tasks=["a", "b", "c"], strength=0.1)


def batches(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        inputs = torch.randn(16, 4, generator=generator)
        yield inputs, torch.cat([(inputs[:, :2] > 0).float(), 50 + 7 * inputs[:, 2:3]], dim=1)


def assert_same(one, other):
    assert one.tasks == other.tasks
    assert list(one.matrices) == list(other.matrices)
    for name in one:
        assert torch.equal(one[name].nan_to_num(9.0), other[name].nan_to_num(9.0)), name


KINDS = {"a": BINARY, "b": BINARY, "c": TaskKind("number", mean=50.0, spread=7.0)}


class TestWatch:
    def test_equals_a_report_at_the_look_of_the_least_loss(self):
        model, regularizer = small()
        watch = RelationWatch(regularizer, KINDS)
        other, its_regularizer = small()
        kinds = {"a": "binary", "b": "binary", "c": "number"}
        report = relation_report(its_regularizer, kinds=kinds, tag_every=2, points=0)
        optimizers = [torch.optim.SGD(own.parameters(), lr=0.1) for own in (model, other)]
        expected = None
        for look, (inputs, labels) in enumerate(batches(6)):
            in_units = labels.double()
            in_units[:, 2] = (in_units[:, 2] - 50) / 7
            for own, penalty, take in (
                (model, regularizer, lambda labels=labels: watch.take(labels)),
                (other, its_regularizer, lambda in_units=in_units: report.update(in_units.float())),
            ):
                outputs = own(inputs)
                take()
                outputs.square().mean().add(penalty()).backward()
            for optimizer in optimizers:
                optimizer.step()
            watch.after_look([5.0, math.nan, 3.0, 2.0, 2.5, 2.0][look])
            if look == 3:
                expected = report.views()
        assert_same(watch.views, expected)
        assert not torch.equal(report.views()["saliency_distance"], expected["saliency_distance"])

    def test_its_state_goes_on(self):
        model, regularizer = small()
        watch = RelationWatch(regularizer, KINDS)
        for inputs, labels in batches(3):
            outputs = model(inputs)
            watch.take(labels)
            (outputs.mean() + regularizer()).backward()
        watch.after_look(1.0)
        other = RelationWatch(small()[1], KINDS)
        other.load_state_dict(watch.state_dict())
        assert isinstance(other.views, RelationViews)
        assert_same(other.views, watch.views)
        other.after_look(2.0)
        assert_same(other.views, watch.views)


def trained(folder, *, resume="never", epochs=6, **options):
    splits = digit_splits(0, 5, 10)
    blueprint = small_blueprint(splits.tasks, "gelu")
    method = METHODS["srdml_default"]
    return train(
        lambda: build(method.architecture, blueprint),
        Data(splits.kinds, splits.train, splits.validation, splits.test),
        method,
        method.fixed,
        Options(epochs=epochs, batch_size=10, learning_rate=5e-3, evaluations=epochs, **options),
        folder=folder,
        resume=resume,
    )


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    return folder, trained(folder, watch_relations=True, checkpoint_steps=5, keep_checkpoints=99)


class TestTraining:
    def test_is_the_same_to_the_bit_with_and_without(self, watched, tmp_path):
        plain = trained(tmp_path)
        assert plain.views is None
        assert plain.scores == watched[1].scores
        assert plain.curves == watched[1].curves

    def test_all_views_of_ten_digits(self, watched):
        views = watched[1].views
        assert len(views.tasks) == 10
        assert len(views.matrices) == 7
        for name, matrix in views.matrices.items():
            if name != "label_correlation":
                assert float(matrix[~torch.eye(10, dtype=torch.bool)].std()) > 0
            assert not matrix[~torch.eye(10, dtype=torch.bool)].isnan().any()

    def test_resumed_it_keeps_the_same(self, watched, tmp_path):
        folder, whole = watched
        shutil.copytree(folder, tmp_path / "half")
        every = Checkpoints(tmp_path / "half", 99).all()
        for later in every[len(every) // 2 :]:
            shutil.rmtree(later)
        options = {"watch_relations": True, "checkpoint_steps": 5, "keep_checkpoints": 99}
        resumed = trained(tmp_path / "half", resume="auto", **options)
        assert_same(resumed.views, whole.views)
        assert resumed.curves == whole.curves

    def test_without_a_regularizer_there_is_nothing_to_watch(self):
        splits = digit_splits(0, 3, 3)
        blueprint = small_blueprint(splits.tasks, "gelu")
        method = METHODS["hard_sharing"]
        outcome = train(
            lambda: build(method.architecture, blueprint),
            Data(splits.kinds, splits.train, splits.validation, None),
            method,
            0.0,
            Options(epochs=1, batch_size=10, watch_relations=True),
        )
        assert outcome.views is None
