"""The data sets of the comparison: each gives every architecture what it is made of, and trains."""

import math

import pytest
import torch

from recipes.compare import COMMAND
from recipes.data.texts.emotions import EMOTIONS
from recipes.models.architectures.registry import ARCHITECTURES, build
from recipes.runtime.errors import OptionError
from recipes.studies.comparison.cells import COMPARED_METHODS, labels_of
from recipes.studies.comparison.data_sets.blueprints import with_flat_outputs
from recipes.studies.comparison.data_sets.options import place_of, setting_of
from recipes.studies.comparison.data_sets.registry import DATA_SETS
from recipes.studies.comparison.data_sets.texts import BY_FREQUENCY
from recipes.training.batches import Feed, MicroBatch
from saliency_reg.errors import BackboneCutError

from .small import TINY, arguments_of, trained, write_all

#: An encoder of texts, and backbones of one layer.
CANNOT_BE_CUT = {"go_emotions", "sarcos", "school", "synthetic"}

pytestmark = [
    pytest.mark.usefixtures("quiet_hub"),
    pytest.mark.filterwarnings("ignore:left out, because there is nothing to learn"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("data"))


def problem_of(key, folder, seed=0):
    options = COMMAND.options_of(arguments_of(key, folder))
    values = setting_of(options, COMPARED_METHODS).values
    return values, DATA_SETS[key].build(values, place_of(options).where, seed)


def batch_of(problem, source, count=3):
    (batch,) = Feed(source, 0, collate=problem.collate)([MicroBatch(0, list(range(count)))])
    return batch


def test_all_are_tried():
    assert set(TINY) == set(DATA_SETS)
    assert set(BY_FREQUENCY) == set(EMOTIONS)


@pytest.mark.parametrize("key", TINY)
class TestEach:
    def test_gives_parts_of_every_architecture(self, key, folder):
        values, problem = problem_of(key, folder)
        assert values["data"] == key
        tasks = tuple(problem.kinds)
        assert problem.blueprint.tasks == tasks
        inputs, labels = batch_of(problem, problem.train)
        assert labels.shape == (3, len(tasks))
        feature = problem.blueprint.backbone().eval()(inputs)
        assert problem.blueprint.vector()(feature).shape == (3, problem.blueprint.width)
        for name in ARCHITECTURES if len(tasks) <= 12 else ("hard_sharing", "mmoe", "groups_apart"):
            torch.manual_seed(0)
            if name == "branching" and key in CANNOT_BE_CUT:
                with pytest.raises((OptionError, BackboneCutError), match="cut"):
                    build(name, problem.blueprint)
                continue
            outputs = with_flat_outputs(build(name, problem.blueprint)).eval()(inputs)
            shapes = {task: (3,) if kind.classes == 1 else (3, kind.classes) for task, kind in problem.kinds.items()}
            assert {task: tuple(own.shape) for task, own in outputs.items()} == shapes, name

    def test_the_same_seed_is_the_same_data(self, key, folder):
        one, again, other = (problem_of(key, folder, seed)[1] for seed in (1, 1, 2))
        for name in ("train", "validation", "test"):
            ours, theirs = (labels_of(getattr(own, name)) for own in (one, again))
            assert torch.equal(ours.nan_to_num(-9), theirs.nan_to_num(-9))
        pairs = [[batch_of(own, getattr(own, name)) for own in (one, other)] for name in ("train", "validation")]
        first = [
            next(iter(value.values())) if isinstance(value, dict) else value for pair in pairs for value, _ in pair
        ]
        assert first[0].shape != first[1].shape or not torch.equal(first[0], first[1]), "another draw"

    @pytest.mark.parametrize("method", ["hard_sharing", "srdml", "pcgrad", "single_task"])
    def test_trains(self, key, folder, tmp_path, method):
        if method == "single_task" and key == "groups":
            pytest.skip("a network for each of very many groups is left out")
        found = trained(COMMAND, key, folder, method, tmp_path)
        data_set = DATA_SETS[key]
        assert set(found["macro"]) == set(data_set.metrics)
        assert found["validation"] is not None
        assert math.isfinite(found["macro"][data_set.compared[0]])
        costs = found["costs"]
        assert costs["parameters"] > 0
        assert costs["seconds_per_step"] > 0
        # Parameters, gradients, and two moments.
        assert costs["peak_memory"] > 4 * 4 * costs["parameters"]
        assert (found["relations"] is not None) == (method == "srdml")

    def test_constant(self, key, folder, tmp_path):
        found = trained(COMMAND, key, folder, "constant", tmp_path)
        if "auc" in found["macro"]:
            assert found["macro"]["auc"] == 0.5
        else:
            assert found["macro"]["nmse"] > 0.5
        assert found["costs"] == {}


def test_the_learned_row_is_far_from_the_constant_one(folder, tmp_path):
    changes = ("train_per_class=5", "validation_per_class=5", "epochs=15")
    for method in ("hard_sharing", "srdml", "pcgrad", "single_task"):
        own = trained(COMMAND, "digits", folder, method, tmp_path / method, changes=changes)
        assert own["macro"]["auc"] > 0.85, method


def test_fingerprints_tell_data_apart(folder, tmp_path):
    other = write_all(tmp_path)
    for key in ("sarcos", "school", "tox21"):
        fingerprint = DATA_SETS[key].fingerprint
        assert fingerprint(folder) == fingerprint(other)
        name = tmp_path / ("tox21.parquet" if key == "tox21" else f"{key}/train.parquet")
        name.write_bytes(name.read_bytes() + b" ")
        assert fingerprint(folder) != fingerprint(other)
