"""What a training loop meets: labels that are missing, single samples, optimizer steps, resuming, removal."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import CaptureError, RepMTL, StateMismatchError
from saliency_reg.regularizer.rep_mtl.loss_penalties import CALLS
from tests.reference.slow_rep_mtl import slow_cross_task, slow_task_specific
from tests.support.attachment import fingerprint, is_clean
from tests.support.training import assert_same_state, batch, make_model
from tests.support.zoo import TASKS, VectorClassifier, VectorHeads

from .models import attached, gradients, losses_of, make, slow_penalty, slow_saliencies, targets_of


def per_sample(outputs: dict[str, Tensor], y: Tensor) -> dict[str, Tensor]:
    return {task: (output - y).square().flatten() for task, output in outputs.items()}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rep: RepMTL, steps: range) -> list[Tensor]:
    found = []
    for step in steps:
        x, y = batch(step)
        losses = per_sample(model(x), y)
        loss = sum(each.mean() for each in losses.values()) + rep(losses=losses)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return found


def test_a_single_sample_has_no_alignment() -> None:
    model, x = make("map")
    rep = attached(model)
    penalty = rep(losses=losses_of(model(x[:1]), targets_of(1)))
    assert rep.report.cross_task == 0
    assert 0 < rep.report.task_specific <= torch.tensor(3.0).log()
    torch.testing.assert_close(penalty.detach(), 0.9 * rep.report.task_specific)
    penalty.backward()


def test_an_empty_batch_and_a_batch_of_single_labels_are_zero() -> None:
    model, x = make("vector")
    rep = attached(model)
    assert rep(losses=losses_of(model(x[:0]), targets_of(0))) == 0
    known = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]], dtype=torch.bool)
    losses = losses_of(model(x), targets_of(4), known)
    (sum(loss.sum() for loss in losses.values()) + rep(losses=losses)).backward()
    assert rep.report.penalty == 0
    assert rep.report.samples.tolist() == [1, 1, 1]


def test_tasks_may_be_left_out() -> None:
    model, x = make("vector")
    targets, known = targets_of(4), torch.ones(4, 3, dtype=torch.bool)
    known[:, 1] = False
    expected = slow_penalty(model, x, targets, known, 1, log_losses=True)
    rep = attached(model)
    losses = losses_of(model(x), targets)
    losses.pop(TASKS[1])
    torch.testing.assert_close(rep(losses=losses), expected)
    assert rep(losses={TASKS[0]: losses_of(model(x), targets)[TASKS[0]]}) == 0


def test_masked_samples_and_positions_do_not_count() -> None:
    model, x = make("tokens")
    targets, known = targets_of(4), torch.ones(4, 3, dtype=torch.bool)
    saliencies = slow_saliencies(model, x, targets, known, 2, log_losses=True)
    real = [[one[:, :3] for one in sample] for sample in saliencies]  # [C, P], of five positions
    expected = 0.9 * slow_task_specific(real) + 0.9 * slow_cross_task(real, 0.5)
    rep = attached(model)
    mask = torch.ones(4, 5)
    mask[:, 3:] = 0
    torch.testing.assert_close(rep(losses=losses_of(model(x), targets), mask=mask), expected)
    three = [saliencies[b] for b in (0, 1, 3)]
    expected = 0.9 * slow_task_specific(three) + 0.9 * slow_cross_task(three, 0.5)
    found = rep(losses=losses_of(model(x), targets), mask=torch.tensor([True, True, False, True]))
    torch.testing.assert_close(found, expected)
    assert rep.report.samples.tolist() == [3, 3, 3]


def test_one_head_with_a_column_per_task_is_as_heads_of_their_own() -> None:
    torch.manual_seed(0)
    whole = VectorClassifier(nn.Linear(6, 3)).double()
    apart = VectorHeads(lambda: nn.Linear(6, 1)).double()
    apart.backbone.load_state_dict(whole.backbone.state_dict())
    with torch.no_grad():
        for row, task in enumerate(TASKS):
            apart.heads[task].weight.copy_(whole.classifier.weight[row : row + 1])
            apart.heads[task].bias.copy_(whole.classifier.bias[row : row + 1])
    x, targets = torch.randn(4, 5, dtype=torch.float64), targets_of(4)
    one = RepMTL(whole, heads="classifier", tasks=TASKS)
    columns = (whole(x) - targets).square()
    found = one(losses=dict(zip(TASKS, columns.unbind(1))))
    rep = attached(apart)
    expected = rep(
        losses={task: (out[:, 0] - targets[:, t]).square() for t, (task, out) in enumerate(apart(x).items())}
    )
    torch.testing.assert_close(found, expected)


def test_the_map_in_front_of_pooling_can_be_named() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.heads = nn.Conv2d(2, 4, 2), nn.ModuleDict({t: nn.Linear(4, 1) for t in TASKS})

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            feature = self.backbone(x).tanh().square().mean((2, 3))
            return {task: head(feature) for task, head in self.heads.items()}

    torch.manual_seed(0)
    model, x = Pooled(), torch.randn(4, 2, 4, 4)
    vector = RepMTL(model, heads="heads")
    one = vector(losses=losses_of(model(x), targets_of(4).float())).detach()
    vector.remove()
    rep = RepMTL(model, heads="heads", feature="backbone")
    other = rep(losses=losses_of(model(x), targets_of(4).float()))
    other.backward()
    assert not torch.isclose(one, other)
    assert model.backbone.weight.grad.abs().max() > 0


@pytest.mark.parametrize(("loss", "reaches"), [("squared", True), ("absolute", False)])
def test_behind_relu_heads_the_curvature_of_the_loss_decides(
    loss: str, reaches: bool, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = VectorHeads(lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1))).double()
    rep = attached(model, log_losses=False)
    with caplog.at_level(logging.WARNING, logger="saliency_reg"):
        errors = {task: output[:, 0] - 2.0 for task, output in model(torch.randn(8, 5, dtype=torch.float64)).items()}
        losses = {task: error.square() if loss == "squared" else error.abs() for task, error in errors.items()}
        found = gradients(rep(losses=losses), model)
    at_backbone, at_heads = found[:2], found[2:]
    assert any(gradient.any() for gradient in at_backbone) == reaches
    assert any(gradient.any() for gradient in at_heads)
    assert ("do not reach the backbone" in caplog.text) == (not reaches)


def test_it_goes_after_remove_and_the_model_is_as_before() -> None:
    model, x = make("vector")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = fingerprint(model)
    rep = RepMTL(model, heads="heads", optimizer=optimizer)
    rep(losses=losses_of(model(x), targets_of(4)))
    report = rep.report
    rep.remove()
    assert is_clean(model)
    assert fingerprint(model) == before
    assert not optimizer._optimizer_step_post_hooks
    assert rep.report is report
    with pytest.raises(CaptureError, match="removed"):
        rep(losses=losses_of(model(x), targets_of(4)))
    with RepMTL(model, heads="heads"):
        assert not is_clean(model)
    assert is_clean(model)


def test_without_gradients_or_enabled_it_is_zero() -> None:
    model, x = make("vector")
    rep = attached(model)
    with torch.no_grad():
        model(x)
        assert rep() == 0
    rep.enabled = False
    model(x)
    assert rep() == 0
    rep.enabled = True
    assert rep(losses=losses_of(model(x), targets_of(4))) != 0


def test_strength_zero_leaves_the_model_as_it_is() -> None:
    model, x = make("vector")
    targets = targets_of(4)
    expected = gradients(sum(loss.mean() for loss in losses_of(model(x), targets).values()), model)
    rep = attached(model, task_specific_strength=0, cross_task_strength=0)
    losses = losses_of(model(x), targets)
    found = gradients(sum(loss.mean() for loss in losses.values()) + rep(losses=losses), model)
    assert all(torch.equal(one, other) for one, other in zip(found, expected))


def test_warm_up_follows_the_optimizer() -> None:
    model, x = make("vector")
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    rep = RepMTL(model, heads="heads", optimizer=optimizer, start_step=1, warmup_steps=2)
    values = []
    for _ in range(4):
        values.append(rep(losses=losses_of(model(x), targets_of(4))).item())
        optimizer.step()
    assert values[0] == 0
    assert values[1] == pytest.approx(values[2] / 2)
    assert values[2] == values[3]
    assert int(rep.steps) == 4


def test_a_skipped_step_does_not_count_and_the_loss_scale_does_not_matter() -> None:
    model, x = make("vector")
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    rep = RepMTL(model, heads="heads", optimizer=optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    losses = losses_of(model(x), targets_of(4))
    scaler.scale(sum(loss.mean() for loss in losses.values()) + rep(losses=losses)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert int(rep.steps) == 1
    losses = losses_of(model(x), targets_of(4))
    scaler.scale(torch.inf * sum(loss.mean() for loss in losses.values()) + rep(losses=losses)).backward()
    scaler.step(optimizer)
    assert int(rep.steps) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_it_is_near_the_penalty_of_full_precision(dtype: torch.dtype) -> None:
    model, x = make("map")
    model, x, targets = model.float(), x.float(), targets_of(4).float()
    rep = attached(model)
    expected = rep(losses=losses_of(model(x), targets)).item()
    with torch.autocast("cpu", dtype=dtype):
        outputs = model(x)
        penalty = rep(losses=losses_of(outputs, targets))
    assert penalty.dtype == torch.float32
    assert penalty.item() == pytest.approx(expected, abs=0.1)
    penalty.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)


def test_micro_batches_are_penalties_of_their_own() -> None:
    model, x = make("map")
    rep, targets = attached(model), targets_of(4)
    parts = [rep(losses=losses_of(model(x[half]), targets[half])) for half in (slice(0, 2), slice(2, 4))]
    known = torch.ones(2, 3, dtype=torch.bool)
    expected = [slow_penalty(model, x[h], targets[h], known, 1, log_losses=True) for h in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(parts, expected)


def test_resumed_training_is_the_uninterrupted_one() -> None:
    def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, RepMTL]:
        model, optimizer = make_model(seed)
        return model, optimizer, RepMTL(model, heads="heads", optimizer=optimizer, start_step=2, warmup_steps=6)

    model, optimizer, rep = build(0)
    train(model, optimizer, rep, range(4))
    checkpoint = io.BytesIO()
    parts = {"model": model, "optimizer": optimizer, "rep": rep}
    torch.save(
        {**{name: part.state_dict() for name, part in parts.items()}, "random": torch.get_rng_state()}, checkpoint
    )
    expected = train(model, optimizer, rep, range(4, 9))
    resumed, resumed_optimizer, resumed_rep = build(9)
    checkpoint.seek(0)
    loaded = torch.load(checkpoint, weights_only=True)
    for name, part in {"model": resumed, "optimizer": resumed_optimizer, "rep": resumed_rep}.items():
        part.load_state_dict(loaded[name])
    torch.set_rng_state(loaded["random"])
    found = train(resumed, resumed_optimizer, resumed_rep, range(4, 9))
    assert torch.equal(torch.stack(found), torch.stack(expected))
    assert_same_state(resumed, model)
    assert_same_state(resumed_rep, rep)


def test_state_of_other_tasks_is_refused() -> None:
    model, _ = make("vector")
    state = attached(model).state_dict()
    assert set(state) == {"task_names", "steps"}
    other = RepMTL(nn.ModuleDict({"heads": nn.ModuleDict({"a": nn.Linear(2, 1), "b": nn.Linear(2, 1)})}), heads="heads")
    with pytest.raises(StateMismatchError, match="first"):
        other.load_state_dict(state)


def test_a_copy_is_not_attached() -> None:
    model, x = make("vector")
    rep = attached(model)
    losses = losses_of(model(x), targets_of(4))
    for twin in (copy.deepcopy(rep), pickle.loads(pickle.dumps(rep))):
        with pytest.raises(CaptureError, match="copy"):
            twin(losses=losses)
    assert rep(losses=losses) != 0


def test_it_tells_if_tasks_never_come_together() -> None:
    model, x = make("vector")
    rep, known = attached(model), torch.eye(4, 3, dtype=torch.bool)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(CALLS + 1):
            rep(losses=losses_of(model(x), targets_of(4), known))
    assert [str(one.message)[:30] for one in told] == [f"in {CALLS} calls no sample has had"[:30]]


def test_it_lowers_what_it_penalises() -> None:
    model, x = make("map")
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for strengths in ((1.0, 0.0), (0.0, 1.0)):
        rep = attached(model, task_specific_strength=strengths[0], cross_task_strength=strengths[1], log_losses=False)
        values = []
        for _ in range(30):
            penalty = rep(losses=losses_of(model(x), targets_of(4)))
            optimizer.zero_grad()
            penalty.backward()
            optimizer.step()
            values.append(penalty.item())
        assert values[-1] < values[0] - 0.05
        rep.remove()
