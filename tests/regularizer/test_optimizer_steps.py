"""When the relations move, and how strong the penalty is then."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import RelationWeights, SaliencyRegularizer, task_distances, task_saliencies
from saliency_reg.errors import TaskError, WrongTypeError
from tests.support.training import TASKS, Net, batch, make_model, train


def moved(regularizer: SaliencyRegularizer) -> int:
    return int(regularizer.relations.updates)


def forward_and_penalty(model: nn.Module, regularizer: SaliencyRegularizer, step: int = 0) -> Tensor:
    outputs = model(batch(step)[0])
    return sum(output.square().mean() for output in outputs.values()) + regularizer()


def test_once_per_optimizer_step() -> None:
    model, optimizer = make_model()
    regularizer = SaliencyRegularizer(model, optimizer=optimizer, strength=0.1, metric="l1")
    for step in range(6):
        forward_and_penalty(model, regularizer, step).backward()
        assert moved(regularizer) == step // 3
        if step % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
    assert moved(regularizer) == 2
    optimizer.step()  # no distances since the last step
    assert moved(regularizer) == 2
    assert int(regularizer.steps) == 3


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_micro_batches_are_combined_by_their_sizes(reduction: str) -> None:
    torch.manual_seed(0)
    model = Net().eval()  # no dropout, fixed statistics: samples are independent
    x = batch(0)[0]
    whole = SaliencyRegularizer(
        model, reduction=reduction, relations=RelationWeights(3, momentum=0.0), strength=0.1, metric="l1"
    )
    model(x)
    whole()
    whole.step()
    whole.remove()
    parts = SaliencyRegularizer(
        model, reduction=reduction, relations=RelationWeights(3, momentum=0.0), strength=0.1, metric="l1"
    )
    for part in x.split([3, 11, 2]):
        model(part)
        parts()
    parts.step()
    torch.testing.assert_close(parts.relations.matrix(), whole.relations.matrix(), rtol=1e-4, atol=1e-9)


def test_custom_loops_call_step() -> None:
    model, _ = make_model()
    regularizer = SaliencyRegularizer(model, strength=0.1, metric="l1")
    forward_and_penalty(model, regularizer)
    regularizer.step()
    assert moved(regularizer) == 1


class Wrapper:
    """As accelerate and others do it."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        self.optimizer.step()


def test_wrapped_and_late_optimizers() -> None:
    model, optimizer = make_model()
    regularizer = SaliencyRegularizer(model, strength=0.1, metric="l1")
    wrapped = Wrapper(Wrapper(optimizer))
    regularizer.attach_optimizer(wrapped)
    forward_and_penalty(model, regularizer).backward()
    wrapped.step()
    assert moved(regularizer) == 1
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    regularizer.attach_optimizer(other)  # no longer the first one
    forward_and_penalty(model, regularizer).backward()
    optimizer.step()
    assert moved(regularizer) == 1
    other.step()
    assert moved(regularizer) == 2


class TwoSteps(torch.optim.Optimizer):
    """The interface of SAM, in the ways that packages have it."""

    def __init__(self, parameters, carried_as: str, **options) -> None:
        super().__init__(parameters, options)
        self.inside = carried_as
        setattr(self, carried_as, torch.optim.SGD(self.param_groups, **options))

    def second_step(self) -> None:
        getattr(self, self.inside).step()

    def step(self, closure=None) -> None:
        self.second_step()


class WithoutInit(torch.optim.Optimizer):
    """As Lookahead in timm, and post-local SGD in torch: without the hooks that optimizers have."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self._base_optimizer = inner
        self.param_groups = inner.param_groups

    def step(self, closure=None) -> None:
        self._base_optimizer.step()


class Alone(WithoutInit):
    def __init__(self, parameters) -> None:
        self.param_groups = [{"params": list(parameters)}]


@pytest.mark.parametrize("carried_as", ["base_optimizer", "optim", "_optimizer", "my_own_name"])
@pytest.mark.parametrize("method", ["step", "second_step"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_optimizers_around_optimizers(carried_as: str, method: str, wrapped: bool) -> None:
    model, _ = make_model()
    optimizer = TwoSteps(model.parameters(), carried_as, lr=0.1)
    outer = WithoutInit(optimizer) if wrapped else optimizer
    regularizer = SaliencyRegularizer(model, optimizer=outer, strength=0.1, metric="l1")
    for _ in range(3):
        forward_and_penalty(model, regularizer).backward()
        outer.step() if wrapped else getattr(optimizer, method)()
    assert moved(regularizer) == int(regularizer.steps) == 3


def test_optimizers_without_hooks_are_refused() -> None:
    model, optimizer = make_model()
    with pytest.raises(WrongTypeError, match=r"Alone derives from torch.optim.Optimizer.*regularizer.step\(\)"):
        SaliencyRegularizer(model, optimizer=Alone(model.parameters()), strength=0.1, metric="l1")
    both = Wrapper(optimizer)
    both.another = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(WrongTypeError, match="found Wrapper"):
        SaliencyRegularizer(model, optimizer=both, strength=0.1, metric="l1")


FUSED_ON_CPU = pytest.param(
    True, marks=pytest.mark.skipif(torch.__version__ < "2.4", reason="fused optimizers for CPU came with torch 2.4")
)


@pytest.mark.parametrize("fused", [False, FUSED_ON_CPU])
def test_steps_that_grad_scaler_skips_do_not_count(fused: bool) -> None:
    model, _ = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused)
    regularizer = SaliencyRegularizer(model, strength=0.1, optimizer=optimizer, metric="l1")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step, factor in enumerate([1.0, float("inf"), 1.0]):
        loss = forward_and_penalty(model, regularizer, step) * factor
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        before = [parameter.clone() for parameter in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        unchanged = all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
        assert unchanged == (step == 1)
        assert int(regularizer.steps) == [1, 1, 2][step]
    assert moved(regularizer) == 2


def test_values_that_are_not_finite_propagate_and_move_nothing() -> None:
    model, optimizer = make_model()
    regularizer = SaliencyRegularizer(model, strength=0.1, optimizer=optimizer, metric="l1")
    train(model, optimizer, range(2), regularizer)
    before = regularizer.relations.matrix()
    bad, _ = batch(2)
    bad[3, 1] = float("nan")
    outputs = model(bad)
    penalty = regularizer()
    assert torch.isnan(penalty)
    del outputs
    regularizer.step()
    assert torch.equal(regularizer.relations.matrix(), before)
    # and the broken batch does not spoil the next step
    updates = moved(regularizer)
    torch.manual_seed(0)
    fresh = Net()
    model.load_state_dict(fresh.state_dict())
    forward_and_penalty(model, regularizer, 3)
    regularizer.step()
    assert moved(regularizer) == updates + 1


def test_schedules() -> None:
    model, optimizer = make_model()
    regularizer = SaliencyRegularizer(
        model, strength=0.8, start_step=2, warmup_steps=4, optimizer=optimizer, metric="l1"
    )
    strengths, penalties = [], []

    def note(step: int) -> None:
        assert regularizer.report is not None
        strengths.append(regularizer.report.strength)
        penalties.append(float(regularizer.report.penalty))

    train(model, optimizer, range(8), regularizer, after=note)
    assert strengths == pytest.approx([0, 0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    assert penalties[:2] == [0, 0]
    assert all(penalty > 0 for penalty in penalties[2:])


def test_strength_can_be_set_while_training() -> None:
    model, _ = make_model()
    regularizer = SaliencyRegularizer(model, strength=1.0, relations="fixed", metric="l1")
    model.eval()
    model(batch(0)[0])
    one = regularizer()
    regularizer.strength = 0.25
    model(batch(0)[0])
    torch.testing.assert_close(regularizer(), one * 0.25)


def test_one_warning_if_the_relations_never_move() -> None:
    model, _ = make_model()
    regularizer = SaliencyRegularizer(model, strength=0.1, metric="l1")

    def calls(number: int) -> None:
        for _ in range(number):
            model(batch(0)[0])
            regularizer()

    calls(99)  # warnings are errors here
    with pytest.warns(
        UserWarning, match=r"in 100 training calls: no optimizer is attached.*regularizer.step\(\)"
    ) as caught:
        calls(150)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_the_warning_comes_after_a_resume_too_and_knows_of_long_accumulation() -> None:
    model, optimizer = make_model()
    regularizer = SaliencyRegularizer(model, optimizer=optimizer, strength=0.1, metric="l1")
    train(model, optimizer, range(2), regularizer)
    resumed_model, resumed_optimizer = make_model()
    resumed = SaliencyRegularizer(resumed_model, strength=0.1, metric="l1")
    resumed.load_state_dict(regularizer.state_dict())
    with pytest.warns(UserWarning, match="no optimizer is attached"):
        train(resumed_model, resumed_optimizer, range(100), resumed)

    def accumulate() -> None:
        for step in range(128):
            forward_and_penalty(model, regularizer, step)

    with pytest.warns(UserWarning, match="the attached optimizer took no step.*if you accumulate"):
        accumulate()


def test_a_head_that_was_replaced_is_told_in_the_next_call() -> None:
    model, optimizer = make_model()
    regularizer = SaliencyRegularizer(model, optimizer=optimizer, strength=0.1, metric="l1")
    train(model, optimizer, range(3), regularizer)
    model.heads["right"] = type(model.heads["right"])()
    with pytest.warns(UserWarning, match=r"'heads.right' is no longer the module.*Call .remove\(\)") as caught:
        train(model, optimizer, range(120), regularizer)
    assert len(caught) == 1


def test_bounded_metrics_have_an_absolute_scale() -> None:
    relations = RelationWeights(3, temperature=1.0)
    distances = torch.tensor([[0.0, 0.1, 0.2], [0.1, 0.0, 0.3], [0.2, 0.3, 0.0]])
    relations.update(distances)
    relative = relations.matrix()
    for metric, absolute in (("sqchordal", True), ("cosine", True), ("l1", False)):
        SaliencyRegularizer(None, tasks=TASKS, metric=metric, relations=relations, strength=0.1)
        assert torch.equal(relations.matrix(), relative) != absolute, metric
    weights = torch.exp(-torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64))
    SaliencyRegularizer(None, tasks=TASKS, metric="cosine", relations=relations, strength=0.1)
    torch.testing.assert_close(relations.matrix()[0, 1], weights[0] / weights.sum(), rtol=1e-6, atol=0)


def test_wrong_arguments_leave_the_relations_alone() -> None:
    model, _ = make_model()
    regularizer = SaliencyRegularizer(model, strength=0.1, metric="l1")
    model(batch(0)[0])
    with pytest.raises(TaskError):
        regularizer(losses={"typo": torch.ones(())})
    assert not regularizer.pending.samples.any()


def test_tasks_that_do_not_run() -> None:
    """Their pairs are left out of the penalty and of the update; with one task left there is no penalty."""
    model, _ = make_model()
    model.eval()
    regularizer = SaliencyRegularizer(
        model, strength=1.0, relations=RelationWeights(3, "projected", learning_rate=0.1), metric="l1"
    )
    left, right, up = TASKS
    feature = model.backbone(batch(0)[0])
    outputs = {left: model.heads[left](feature), up: model.heads[up](feature)}
    penalty = regularizer()
    expected = task_distances(task_saliencies(outputs, feature))[0, 1]
    torch.testing.assert_close(penalty, expected / 3)
    assert regularizer.report is not None
    assert regularizer.report.present == (left, up)
    assert torch.isnan(regularizer.report.distances[0, 1])
    before = regularizer.relations.matrix()
    regularizer.step()
    assert torch.equal(regularizer.relations.matrix()[1], before[1])
    feature = model.backbone(batch(1)[0])
    model.heads[right](feature)
    assert regularizer() == 0


def test_report_and_share() -> None:
    model, _ = make_model()
    model.eval()
    regularizer = SaliencyRegularizer(model, strength=0.3, metric="l1")
    outputs = model(batch(0)[0])
    losses = {task: output.square().mean() for task, output in outputs.items()}
    penalty = regularizer(losses=losses)
    report = regularizer.report
    assert report is not None
    assert report.tasks == TASKS
    total = float(sum(losses.values()).detach())
    assert report.share == pytest.approx(float(penalty.detach()) / total)
    by_hand = 0.3 * float((report.distances * report.relations).triu(1).sum())
    assert by_hand == pytest.approx(float(penalty.detach()))
    plain = report.to_dict()
    assert plain["share"] == report.share
    assert plain["relations"] == report.relations.tolist()
