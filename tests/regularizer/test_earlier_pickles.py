"""Pickles that version 0.1.0 wrote are read, and go on as they would have gone on there."""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from saliency_reg import FeatureSurgery, ParameterSurgery, PCGrad, RelationWeights, SaliencyRegularizer, task_distances
from saliency_reg.regularizer.earlier_pickles import as_now

FILE = Path(__file__).parent / "data" / "pickles_of_0_1_0.pkl"
SAVED: dict[str, dict[str, Any]] = pickle.loads(FILE.read_bytes())
GRAMIAN = torch.tensor([[1.0, -0.5, -0.2], [-0.5, 2.0, -0.9], [-0.2, -0.9, 1.0]], dtype=torch.float64)
TASKS = ("a", "b", "c")


def loaded(name: str) -> Any:
    return pickle.loads(SAVED["pickles"][name])


def assert_same_state(found: dict[str, Tensor], name: str) -> None:
    expected = SAVED["expected"][name]
    assert list(found) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rule", ["entropic", "projected", "authors", "fixed"])
def test_relations(rule: str) -> None:
    relations = loaded(f"relations {rule}")
    assert isinstance(relations, RelationWeights)
    relations.update(torch.tensor([[0.0, 3, 1], [3, 0, 2], [1, 2, 0]]))
    assert relations.matrix().tolist() == SAVED["expected"][f"relations {rule}"]


def test_weighting_goes_on_with_its_draws() -> None:
    weighting = loaded("pcgrad")
    assert isinstance(weighting, PCGrad)
    assert weighting(GRAMIAN).tolist() == SAVED["expected"]["pcgrad"]


@pytest.mark.parametrize("name", ["regularizer", "surgery"])
def test_regularizers(name: str) -> None:
    regularizer = loaded(name)
    assert isinstance(regularizer, SaliencyRegularizer)
    assert_same_state(regularizer.state_dict(), f"{name} state")
    assert regularizer.describe() == SAVED["expected"][f"{name} text"]
    if name == "regularizer":
        for seed, expected in enumerate(SAVED["expected"]["regularizer penalties"]):
            generator = torch.Generator().manual_seed(seed)
            feature = torch.randn(5, 6, generator=generator, dtype=torch.float64, requires_grad=True)
            outputs = {task: (feature * (index + 1)).tanh().sum(1) for index, task in enumerate(TASKS)}
            assert regularizer(outputs=outputs, features=feature).item() == expected
            regularizer.step()
    else:
        regularizer.step()
    assert regularizer.relations.matrix().tolist() == SAVED["expected"][f"{name} after"]
    again = pickle.loads(pickle.dumps(regularizer))
    assert again.describe() == regularizer.describe()


@pytest.mark.parametrize("name", ["regularizer report", "surgery report"])
def test_reports(name: str) -> None:
    assert repr(loaded(name).to_dict()) == repr(SAVED["expected"][name])  # NaN is NaN there


def test_surgeries() -> None:
    surgery = loaded("feature surgery")
    assert isinstance(surgery, FeatureSurgery)
    assert surgery.weighting(GRAMIAN).tolist() == SAVED["expected"]["feature surgery"]
    parameters = loaded("parameter surgery")
    assert isinstance(parameters, ParameterSurgery)
    assert_same_state(parameters.state_dict(), "parameter surgery")


@pytest.mark.parametrize(
    "name",
    [
        "timm.backbone.Backbone",
        "timm.feature_layout.Tokens",
        "timm.head_config.HeadConfig",
        "timm.model.TimmMultiTaskModel",
        "timm.pooling.FeaturePooling",
        "timm.unmodified._PartRegularizer",
        "transformers.configuration.MultiTaskConfig",
        "transformers.head_config.HeadConfig",
        "transformers.masked.MaskedRegularizer",
        "transformers.model.MultiTaskModel",
        "transformers.output.MultiTaskOutput",
        "transformers.pooling.SequencePooling",
        "transformers.unmodified._ClassifierRegularizer",
    ],
)
def test_names_of_the_integrations(name: str) -> None:
    package, module, kind = name.split(".")
    pytest.importorskip(package)
    found = getattr(importlib.import_module(f"saliency_reg.integrations.{package}.{module}"), kind)
    assert found.__name__ == kind
    assert found.__module__.startswith(f"saliency_reg.integrations.{package}.")


def test_other_names_are_missing_as_before() -> None:
    with pytest.raises(ModuleNotFoundError, match="No module named 'saliency_reg.nothing'"):
        importlib.import_module("saliency_reg.nothing")


def test_functions_and_what_was_told() -> None:
    assert pickle.loads(b"csaliency_reg.distances\ntask_distances\n.") is task_distances
    first_call = SimpleNamespace(cross_sample="warn", _warned=True, _unmixed=set(), _mixed={(0, (True,))}, _undecided=3)
    first_call._differentiated = {"a"}
    evaluator = SimpleNamespace(target="output", scalarize="auto", pool="sum", channel_axis=None, loss_reduction="mean")
    schedule = SimpleNamespace(strength=0.1, warmup_steps=0, start_step=0)
    state: dict[str, Any] = {"_evaluator": evaluator, "_first_call": first_call, "_schedule": schedule, "_joiner": None}
    state |= {"metric": "l1", "reduction": "mean", "check_finite": False, "_form": None, "_reaches_backbone": None}
    state |= {
        "_feature_shape": None,
        "_closed_form": False,
        "_modules": {"sampler": SimpleNamespace(most=None, seed=0)},
    }
    now = as_now(state)
    assert now["_mixing"]._warned
    assert now["_mixing"]._mixed == {(0, (True,))}
    assert now["_reach"]._differentiated == {"a"}


def test_what_was_told_and_seen_is_not_in_older_pickles() -> None:
    torch.manual_seed(0)
    heads = torch.nn.ModuleDict({task: torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Tanh()) for task in TASKS})
    regularizer = SaliencyRegularizer(torch.nn.ModuleDict({"heads": heads}), "heads", strength=1.0, metric="l1")
    del vars(regularizer._extractor)["have_saliency"]
    assert "_told" not in vars(regularizer._reach)
    saved = pickle.dumps(regularizer)
    heads.requires_grad_(False)
    feature = torch.randn(5, 6, requires_grad=True)
    for again in (pickle.loads(saved), pickle.loads(saved)):  # what one has told, the other has not
        with pytest.warns(UserWarning, match="a value and no gradient"):
            first = again(outputs={task: head[0](feature) for task, head in heads.items()}, features=feature)
        second = again(outputs={task: head[0](feature) for task, head in heads.items()}, features=feature)
        assert first == second > 0
        again.load_state_dict(again.state_dict())
        assert again.saliency_seen.tolist() == [1, 1, 1]


def test_classes_for_the_trainer() -> None:
    pytest.importorskip("transformers")
    place = b"saliency_reg.integrations.transformers."
    for module, name in ((b"trainer_loss", b"SaliencyLoss"), (b"trainer_callback", b"SaliencyCallback")):
        assert pickle.loads(b"c" + place + module + b"\n" + name + b"\n.").__name__ == name.decode()
