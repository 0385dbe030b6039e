"""Wrong use: a typed error that says what to use instead, and the model left as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import RelationWeights, SaliencyRegError, SaliencyRegularizer, errors, task_distances, task_saliencies
from tests.support.attachment import fingerprint
from tests.support.training import Net, batch


@dataclass
class Case:
    """A way to build wrongly."""

    build: Callable[[nn.Module], Any]
    error: type[Exception]
    builtin: type[Exception]
    text: str
    model: Callable[[], nn.Module] = Net


class TwoGroups(Net):
    def __init__(self) -> None:
        super().__init__()
        self.decoders = nn.ModuleList([nn.Linear(8, 1), nn.Linear(8, 1)])


class NoHeads(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 8), nn.ReLU())


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(6, 8)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.backbone(x))


ATTACHING = {
    "no such head, near miss": Case(
        lambda m: SaliencyRegularizer(m, ["left", "rihgt"], strength=0.1, metric="l1"),
        errors.HeadNotFoundError, LookupError, r"no head 'rihgt'\. Did you mean 'heads\.right'",
    ),
    "no such head": Case(
        lambda m: SaliencyRegularizer(m, "zzz", strength=0.1, metric="l1"),
        errors.HeadNotFoundError, LookupError, r"no head 'zzz'\. It has 'heads', 'backbone'",
    ),
    "no such pattern": Case(
        lambda m: SaliencyRegularizer(m, "branch.*", strength=0.1, metric="l1"), errors.HeadNotFoundError, LookupError, r"no head 'branch\.\*'",
    ),
    "a name of several modules": Case(
        lambda m: SaliencyRegularizer(m, ["out", "left"], strength=0.1, metric="l1"),
        errors.AmbiguousModuleError, ValueError, r"'out' means several modules: 'heads\.left\.out'.*Pass the full name",
    ),
    "two groups of heads": Case(
        lambda m: SaliencyRegularizer(m, strength=0.1, metric="l1"),
        errors.AmbiguousHeadsError, ValueError, r"several groups.*'heads' \(3 modules: 'heads.left'.*8 inputs and 1 output each\); 'decoders' \(2 modules",

        TwoGroups,
    ),
    "no heads to be found": Case(
        lambda m: SaliencyRegularizer(m, strength=0.1, metric="l1"), errors.HeadNotFoundError, LookupError, "no heads were found in NoHeads.*Pass heads=",
        NoHeads,
    ),
    "one head": Case(
        lambda m: SaliencyRegularizer(m, {"left": "left"}, strength=0.1, metric="l1"), errors.TaskError, ValueError, "at least 2",
    ),
    "one column": Case(
        lambda m: SaliencyRegularizer(m, "heads.left.out", strength=0.1, metric="l1"), errors.TaskError, ValueError, "single head with 1 output",
    ),
    "the same head twice": Case(
        lambda m: SaliencyRegularizer(m, ["left", "heads.left"], strength=0.1, metric="l1"), errors.TaskError, ValueError, "'heads.left' was given twice",
    ),
    "a head inside another": Case(
        lambda m: SaliencyRegularizer(m, ["left", "heads.left.out"], strength=0.1, metric="l1"),
        errors.TaskError, ValueError, "'heads.left.out' is part of head 'heads.left'",
    ),
    "the model as its own head": Case(
        lambda m: SaliencyRegularizer(m, [m, "left"], strength=0.1, metric="l1"), errors.TaskError, ValueError, "the model itself was given as a head",
    ),
    "heads of a wrong type": Case(
        lambda m: SaliencyRegularizer(m, 3, strength=0.1, metric="l1"), errors.WrongTypeError, TypeError, "heads must be a name, a module, a list",
    ),
    "duplicate task names": Case(
        lambda m: SaliencyRegularizer(m, "heads", tasks=["a", "b", "a"], strength=0.1, metric="l1"),
        errors.TaskError, ValueError, r"\['a'\] occur more than once",
    ),
    "too few task names": Case(
        lambda m: SaliencyRegularizer(m, "heads", tasks=["a", "b"], strength=0.1, metric="l1"),
        errors.TaskError, ValueError, r"2 task names \['a', 'b'\] for 3 heads",
    ),
    "task names as one string": Case(
        lambda m: SaliencyRegularizer(m, "heads", tasks="abc", strength=0.1, metric="l1"), errors.WrongTypeError, TypeError, "tasks must be a list",
    ),
    "task names that contradict the mapping": Case(
        lambda m: SaliencyRegularizer(m, {"a": "left", "b": "right"}, tasks=["b", "a"], strength=0.1, metric="l1"),
        errors.TaskError, ValueError, "Leave tasks= out",
    ),
    "task names that do not match the columns": Case(
        lambda m: SaliencyRegularizer(m, "fc", tasks=["a", "b"], strength=0.1, metric="l1"),
        errors.TaskError, ValueError, "2 names, but 'fc' has 3 output columns", Classifier,
    ),
    "no such feature": Case(
        lambda m: SaliencyRegularizer(m, "heads", feature="bakbone", strength=0.1, metric="l1"),
        errors.ModuleNotFoundInModelError, LookupError, "no feature 'bakbone'. Did you mean 'backbone'",
    ),
    "no such port": Case(
        lambda m: SaliencyRegularizer(m, "heads", feature="backbone:left", strength=0.1, metric="l1"),
        errors.ConfigurationError, ValueError, "Pass 'backbone:output'",
    ),
    "no module": Case(
        lambda m: SaliencyRegularizer(lambda x: x, strength=0.1, metric="l1"), errors.WrongTypeError, TypeError, "model must be a torch.nn.Module",
    ),
    "DataParallel": Case(
        lambda m: SaliencyRegularizer(nn.DataParallel(m), "heads", strength=0.1, metric="l1"),
        errors.ConfigurationError, ValueError, "DataParallel.*Use DistributedDataParallel",
    ),
    "negative strength": Case(
        lambda m: SaliencyRegularizer(m, strength=-0.1, metric="l1"), errors.ConfigurationError, ValueError, "strength must be .*found -0.1",
    ),
    "infinite strength": Case(
        lambda m: SaliencyRegularizer(m, strength=float("inf"), metric="l1"), errors.ConfigurationError, ValueError, "found inf",
    ),
    "strength of a wrong type": Case(
        lambda m: SaliencyRegularizer(m, strength="0.1", metric="l1"), errors.WrongTypeError, TypeError, "strength must be a number",
    ),
    "unknown metric": Case(
        lambda m: SaliencyRegularizer(m, metric="L1", strength=0.1), errors.ConfigurationError, ValueError, "unknown metric 'L1'.*'l1'",
    ),
    "unknown pool": Case(
        lambda m: SaliencyRegularizer(m, pool="max", strength=0.1, metric="l1"), errors.ConfigurationError, ValueError, "unknown pool 'max'",
    ),
    "unknown reduction": Case(
        lambda m: SaliencyRegularizer(m, reduction="none", strength=0.1, metric="l1"), errors.ConfigurationError, ValueError, "unknown reduction",
    ),
    "unknown scalarisation": Case(
        lambda m: SaliencyRegularizer(m, scalarize="argmax", strength=0.1, metric="l1"),
        errors.ConfigurationError, ValueError, "unknown scalarize 'argmax'.*or pass a callable",
    ),
    "scalarisation of another task": Case(
        lambda m: SaliencyRegularizer(m, scalarize={"lef": "max"}, strength=0.1, metric="l1"),
        errors.TaskError, ValueError, r"scalarize= names \['lef'\], which are not tasks. The tasks are \['left', 'right', 'up'\]",
    ),
    "unknown target": Case(
        lambda m: SaliencyRegularizer(m, target="logits", strength=0.1, metric="l1"), errors.ConfigurationError, ValueError, "unknown target 'logits'",
    ),
    "unknown rule": Case(
        lambda m: SaliencyRegularizer(m, relations="softmax", strength=0.1, metric="l1"),
        errors.ConfigurationError, ValueError, "unknown rule 'softmax'.*'entropic'",
    ),
    "relations of another number of tasks": Case(
        lambda m: SaliencyRegularizer(m, relations=RelationWeights(4), strength=0.1, metric="l1"),
        errors.TaskError, ValueError, r"num_tasks=4, but there are 3 tasks. Pass RelationWeights\(3",
    ),
    "relations of a wrong type": Case(
        lambda m: SaliencyRegularizer(m, relations=torch.ones(3, 3), strength=0.1, metric="l1"), errors.WrongTypeError, TypeError, "relations must be",
    ),
    "no optimizer": Case(
        lambda m: SaliencyRegularizer(m, optimizer=m.parameters(), strength=0.1, metric="l1"),
        errors.WrongTypeError, TypeError, r"optimizer must be .*call regularizer.step\(\)",
    ),
    "a scheduler as optimizer": Case(
        lambda m: SaliencyRegularizer(
            m, optimizer=torch.optim.lr_scheduler.StepLR(torch.optim.SGD(m.parameters(), lr=0.1), 1)
        , strength=0.1, metric="l1"),
        errors.WrongTypeError, TypeError, "optimizer must be .*found StepLR",
    ),
    "one task per step": Case(
        lambda m: SaliencyRegularizer(m, max_tasks_per_step=1, strength=0.1, metric="l1"), errors.ConfigurationError, ValueError, "at least 2, found 1",
    ),
    "half a task per step": Case(
        lambda m: SaliencyRegularizer(m, max_tasks_per_step=2.5, strength=0.1, metric="l1"), errors.WrongTypeError, TypeError, r"max_tasks_per_step must be an int, found 2.5 \(float\)",
    ),
    "unknown cross_sample": Case(
        lambda m: SaliencyRegularizer(m, cross_sample="raise", strength=0.1, metric="l1"), errors.ConfigurationError, ValueError, "unknown cross_sample",
    ),
    "a feature twice": Case(
        lambda m: SaliencyRegularizer(m, "heads", feature=["backbone", "backbone:output"], strength=0.1, metric="l1"),
        errors.ConfigurationError, ValueError, "a feature map twice",
    ),
    "a feature of a wrong type": Case(
        lambda m: SaliencyRegularizer(m, "heads", feature=[3], strength=0.1, metric="l1"), errors.WrongTypeError, TypeError, "found int",
    ),
    "a number for a feature": Case(
        lambda m: SaliencyRegularizer(m, "heads", feature=3, strength=0.1, metric="l1"), errors.WrongTypeError, TypeError, "found int",
    ),
    "a part of an input after a second colon": Case(
        lambda m: SaliencyRegularizer(m, "heads", feature="backbone:input:0", strength=0.1, metric="l1"),
        errors.ConfigurationError, ValueError, "'backbone:input.0'",
    ),
    "a part of a feature after a second colon": Case(
        lambda m: SaliencyRegularizer(m, "heads", feature="backbone:output:0", strength=0.1, metric="l1"),
        errors.ConfigurationError, ValueError, "'backbone:output.0'",
    ),
    "output parts of other tasks": Case(
        lambda m: SaliencyRegularizer(m, "heads", output={"lef": 0}, strength=0.1, metric="l1"), errors.TaskError, ValueError, r"output= names \['lef'\]",
    ),
    "half a warm-up step": Case(
        lambda m: SaliencyRegularizer(m, warmup_steps=0.5, strength=0.1, metric="l1"), errors.WrongTypeError, TypeError, "warmup_steps must be an int",
    ),
    "a negative start": Case(
        lambda m: SaliencyRegularizer(m, start_step=-1, strength=0.1, metric="l1"), errors.ConfigurationError, ValueError, "start_step must be at least 0",
    ),
    "authors' conventions overruled": Case(
        lambda m: SaliencyRegularizer.authors(m, metric="l2"), errors.ConfigurationError, ValueError, r"\['metric'\] are fixed",
    ),
    "no model and no tasks": Case(
        lambda m: SaliencyRegularizer(None, strength=0.1, metric="l1"), errors.MissingArgumentError, TypeError, "Pass tasks=",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACHING)
def test_attaching(name: str) -> None:
    case = ATTACHING[name]
    model = case.model()
    before = fingerprint(model)
    with pytest.raises(case.error, match=case.text) as caught:
        case.build(model)
    assert type(caught.value) is case.error
    assert isinstance(caught.value, SaliencyRegError)
    assert isinstance(caught.value, case.builtin)
    assert fingerprint(model) == before


def test_attaching_twice() -> None:
    model = Net()
    first = SaliencyRegularizer(model, "heads", strength=0.1, metric="l1")
    before = fingerprint(model)
    with pytest.raises(errors.AlreadyAttachedError, match=r"attached to head 'heads.left' already. Call .remove\(\)"):
        SaliencyRegularizer(model, ["left", "up"], strength=0.1, metric="l1")
    assert fingerprint(model) == before
    first.remove()
    SaliencyRegularizer(model, "heads", strength=0.1, metric="l1")


class Odd(Net):
    """A model that does one thing wrong per mode."""

    mode = ""

    def forward(self, x: Tensor) -> Any:
        feature = self.backbone(x)
        if self.mode == "no head":
            return feature
        if self.mode == "different features":
            return [head(feature * scale) for scale, head in enumerate(self.heads.values(), 1)]
        if self.mode == "cut":
            return [head(torch.zeros_like(feature)) for head in self.heads.values()]
        if self.mode == "no tensor":
            return [head([feature]) for head in self.heads.values()]
        outputs = [head(feature) for head in self.heads.values()]
        if self.mode == "twice":
            self.heads["left"](feature)
        return outputs


class Loose(nn.Module):
    """A head that takes or returns something else than a tensor."""

    def __init__(self, returns_list: bool = False) -> None:
        super().__init__()
        self.layer, self.returns_list = nn.Linear(8, 1), returns_list

    def forward(self, feature: Any) -> Any:
        output = self.layer(feature[0] if isinstance(feature, list) else feature)
        return [output] if self.returns_list else output


FORWARDS = {
    "no head": (errors.CaptureError, "no head ran in the latest forward"),
    "different features": (errors.CaptureError, "heads do not read the same tensor.*feature='backbone'"),
    "twice": (errors.CaptureError, "head 'heads.left' ran twice in one forward"),
    "no tensor": (errors.CaptureError, "called without a floating-point tensor"),
}


@pytest.mark.parametrize("mode", FORWARDS)
def test_forwards_that_cannot_be_used(mode: str) -> None:
    model = Odd()
    if mode == "no tensor":
        model.heads = nn.ModuleDict({task: Loose() for task in model.heads})
    regularizer = SaliencyRegularizer(model, "heads", strength=0.1, metric="l1")
    model.mode = mode
    model(batch(0)[0])
    error, text = FORWARDS[mode]
    with pytest.raises(error, match=text) as caught:
        regularizer()
    assert isinstance(caught.value, RuntimeError)
    model.mode = ""
    if mode != "no tensor":
        model(batch(0)[0])
        assert regularizer() > 0  # the next good forward works


def test_a_head_that_returns_no_tensor() -> None:
    model = Odd()
    model.heads = nn.ModuleDict({task: Loose(returns_list=True) for task in model.heads})
    regularizer = SaliencyRegularizer(model, "heads", strength=0.1, metric="l1")
    model(batch(0)[0])
    with pytest.raises(errors.CaptureError, match="returned list, expected a tensor"):
        regularizer()


def test_outputs_that_do_not_depend_on_the_feature() -> None:
    model = Odd()
    model.mode = "cut"
    regularizer = SaliencyRegularizer(model, "heads", feature="backbone", strength=0.1, metric="l1")
    model(batch(0)[0])
    with pytest.raises(errors.NotConnectedError, match="does not depend on the feature map"):
        regularizer()


def test_calling_at_the_wrong_time() -> None:
    model = Net()
    regularizer = SaliencyRegularizer(model, strength=0.1, metric="l1")
    with pytest.raises(errors.CaptureError, match="has not run a forward yet"):
        regularizer()
    model(batch(0)[0])
    regularizer()
    with pytest.raises(errors.CaptureError, match="was read already, and each is read once"):
        regularizer()
    regularizer.remove()
    model(batch(0)[0])
    with pytest.raises(errors.CaptureError, match="was removed from the model"):
        regularizer()


@pytest.mark.parametrize(
    ("options", "arguments", "error", "text"),
    [
        ({"target": "loss"}, {}, errors.MissingArgumentError, r"Pass regularizer\(losses="),
        ({"target": "loss"}, {"losses": {"lift": 1}}, errors.TaskError, r"names \['lift'\], which are not tasks"),
        ({"target": "loss"}, {"losses": [torch.ones(())]}, errors.TaskError, "1 entries for 3 tasks"),
        ({"target": "loss"}, {"losses": {"left": 1.0}}, errors.WrongTypeError, "must be a tensor, found float"),
        ({"target": "loss"}, {"losses": {"left": torch.ones(2, 2)}}, errors.ShapeError, "one value per sample"),
        ({}, {"losses": torch.ones(3)}, errors.WrongTypeError, "losses must be a mapping"),
        ({}, {"mask": torch.ones(16, 4)}, errors.ShapeError, "no positions"),
        ({}, {"targets": {"down": torch.ones(16)}}, errors.TaskError, r"targets names \['down'\]"),
        ({"channel_axis": 2}, {}, errors.ShapeError, "channel_axis=2 is not a channel axis"),
        ({}, {"outputs": {"left": torch.ones(3)}}, errors.MissingArgumentError, "features= is missing"),
        ({"check_finite": True}, {"x": float("nan")}, errors.NonFiniteError, "hold NaN or infinite"),
    ],
)
def test_calling_with_wrong_arguments(options: dict, arguments: dict, error: type[Exception], text: str) -> None:
    model = Net()
    regularizer = SaliencyRegularizer(model, "heads", **{"strength": 0.1, "metric": "l1", **options})
    x = batch(0)[0] * arguments.pop("x", 1.0)
    model(x)
    with pytest.raises(error, match=text) as caught:
        regularizer(**arguments)
    assert type(caught.value) is error


def test_losses_without_a_graph() -> None:
    model = Net()
    regularizer = SaliencyRegularizer(model, "heads", target="loss", strength=0.1, metric="l1")
    for _ in range(2):
        outputs = model(batch(0)[0])
        losses = {task: output.square().mean() for task, output in outputs.items()}
        losses["up"] = torch.zeros(())
        with pytest.raises(errors.NotConnectedError, match="loss of task 'up' carries no graph. Leave the task out"):
            regularizer(losses=losses)


def test_backward_before_the_penalty() -> None:
    model = Net()
    regularizer = SaliencyRegularizer(model, "heads", strength=0.1, metric="l1")
    outputs = model(batch(0)[0])
    sum(output.square().mean() for output in outputs.values()).backward()
    with pytest.raises(errors.NotConnectedError, match=r"\(loss \+ regularizer\(\)\).backward\(\)"):
        regularizer()


def test_a_named_feature_that_did_not_run() -> None:
    model = Odd()
    model.unused = nn.Linear(6, 8)
    regularizer = SaliencyRegularizer(model, "heads", feature="unused", strength=0.1, metric="l1")
    model(batch(0)[0])
    with pytest.raises(errors.CaptureError, match="'unused:output' did not run with gradients"):
        regularizer()


def test_state_of_other_tasks_or_rules() -> None:
    state = SaliencyRegularizer(Net(), "heads", strength=0.1, metric="l1").state_dict()
    with pytest.raises(
        errors.StateMismatchError, match=r"saved for the tasks \['left', 'right', 'up'\].*\['a', 'b', 'c'\]"
    ):
        SaliencyRegularizer(Net(), "heads", tasks=list("abc"), strength=0.1, metric="l1").load_state_dict(state)
    with pytest.raises(errors.StateMismatchError, match="saved with another rule"):
        SaliencyRegularizer(Net(), "heads", relations="projected", strength=0.1, metric="l1").load_state_dict(state)
    with pytest.raises(errors.StateMismatchError, match="another number of tasks"):
        RelationWeights(4).load_state_dict(RelationWeights(3).state_dict())


FEATURE = torch.ones(4, 5, requires_grad=True)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: task_saliencies(FEATURE @ torch.ones(5, 3), FEATURE),
            errors.WrongTypeError,
            r"outputs=outputs.unbind\(1\)",
        ),
        (lambda: task_saliencies([FEATURE.sum(1)], FEATURE), errors.TaskError, "at least 2"),
        (lambda: task_saliencies([FEATURE.sum(1)] * 2, FEATURE[0]), errors.ShapeError, r"\[B, C\]"),
        (lambda: task_saliencies([FEATURE.sum(1)] * 2, FEATURE.detach()), errors.NotConnectedError, "requires_grad_"),
        (lambda: task_saliencies([torch.ones(4)] * 2, FEATURE), errors.NotConnectedError, "carries no graph"),
        (
            lambda: task_saliencies({"a": FEATURE.sum(1), "b": torch.ones(4, requires_grad=True)}, FEATURE),
            errors.NotConnectedError,
            r"\['b'\] does not depend",
        ),
        (lambda: task_saliencies([FEATURE.sum(1)] * 2, [FEATURE] * 3), errors.TaskError, "3 features for 2 tasks"),
        (lambda: task_saliencies([FEATURE.sum(0)] * 2, FEATURE), errors.ShapeError, "5 samples.*has 4"),
        (lambda: task_saliencies([FEATURE] * 2, FEATURE, scalarize="label"), errors.MissingArgumentError, "targets="),
        (
            lambda: task_saliencies([FEATURE] * 2, FEATURE, scalarize="label", targets=[torch.full((4,), 9)] * 2),
            errors.ShapeError,
            "5 classes",
        ),
        (
            lambda: task_saliencies([FEATURE] * 2, FEATURE, scalarize="label", targets=[torch.ones(4)] * 2),
            errors.ShapeError,
            "integer class indices",
        ),
        (lambda: task_saliencies([FEATURE.log() * torch.nan] * 2, FEATURE), errors.NonFiniteError, "NaN or infinite"),
        (
            lambda: task_saliencies([FEATURE[:, None] * FEATURE[:, :, None]] * 2, FEATURE),
            errors.ShapeError,
            "which axis",
        ),
        (lambda: task_distances([torch.ones(2, 3)]), errors.WrongTypeError, "torch.stack"),
        (lambda: task_distances(torch.ones(2, 3)), errors.ShapeError, r"\[T, B, C\]"),
        (lambda: task_distances(torch.ones(1, 3, 4)), errors.ShapeError, "T >= 2"),
        (lambda: task_distances(torch.ones(2, 0, 4)), errors.ShapeError, "B >= 1"),
        (lambda: task_distances(torch.ones(2, 3, 4, dtype=torch.int64)), errors.WrongTypeError, "float"),
        (lambda: task_distances(torch.ones(2, 3, 4) * torch.nan), errors.NonFiniteError, "24 NaN"),
        (lambda: RelationWeights(1), errors.TaskError, "at least 2"),
        (lambda: RelationWeights(3, mass=0), errors.ConfigurationError, "mass must be"),
        (lambda: RelationWeights(3, temperature=-1.0), errors.ConfigurationError, "temperature must be"),
        (lambda: RelationWeights(3, momentum="0.9"), errors.WrongTypeError, "momentum must be a number"),
        (lambda: RelationWeights(3, momentum=1.0), errors.ConfigurationError, "momentum must be"),
        (lambda: RelationWeights(3, scale="max"), errors.ConfigurationError, "unknown scale"),
        (lambda: RelationWeights(3, matrix=torch.ones(3, 3)), errors.ConfigurationError, "Pass rule='fixed'"),
        (lambda: RelationWeights(3, "fixed", matrix=torch.ones(2, 2)), errors.ShapeError, r"must be \[3, 3\]"),
        (
            lambda: RelationWeights(2, "fixed", matrix=torch.tensor([[0.0, 1.0], [2.0, 0.0]])),
            errors.ConfigurationError,
            "not symmetric",
        ),
        (
            lambda: RelationWeights(2, "fixed", matrix=torch.tensor([[0.0, -1.0], [-1.0, 0.0]])),
            errors.ConfigurationError,
            "negative weights",
        ),
        (lambda: RelationWeights(2, "fixed", matrix=torch.ones(2, 2)), errors.ConfigurationError, "diagonal"),
        (lambda: RelationWeights(2, "fixed", matrix=torch.zeros(2, 2)), errors.ConfigurationError, "Leave it out"),
        (lambda: RelationWeights(3).update(torch.ones(2, 2)), errors.ShapeError, r"\[3, 3\], found \[2, 2\]"),
        (lambda: RelationWeights(3).update(torch.ones(3, 3), strength=-1.0), errors.ConfigurationError, "strength"),
        (lambda: RelationWeights(3).coefficients, errors.ConfigurationError, r"Use .matrix\(\)"),
    ],
)
def test_pure_functions_and_relations(call: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text) as caught:
        call()
    assert type(caught.value) is error
