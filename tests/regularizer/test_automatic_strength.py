"""``strength="auto"``: against sums by hand in float64, in every kind of training step, and as state."""

from __future__ import annotations

import copy
import io
import logging
import pickle

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import PCGrad, RelationWeights, SaliencyRegularizer
from saliency_reg.errors import (
    ConfigurationError,
    MissingArgumentError,
    ReaderError,
    SecondDerivativeError,
    StateMismatchError,
    WrongTypeError,
)
from saliency_reg.regularizer.strength import WINDOW
from tests.reference.slow import slow_distances, slow_penalty
from tests.support.training import TASKS, assert_same_state, make_model
from tests.support.training import batch as random_batch

pytestmark = pytest.mark.usefixtures("float64")


class Net(nn.Module):
    """Runs the heads that it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 5), nn.Tanh())
        self.heads = nn.ModuleDict({t: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)) for t in TASKS})

    def forward(self, x: Tensor, tasks: tuple[str, ...] = TASKS) -> dict[str, Tensor]:
        feature = self.backbone(x)
        return {task: self.heads[task](feature).squeeze(1) for task in tasks}


def make(share: float = 0.5, rate: float = 0.05, **options: object):
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), rate)
    regularizer = SaliencyRegularizer(
        model, "heads", strength="auto", share=share, optimizer=optimizer, **{"metric": "l1", **options}
    )
    return model, optimizer, regularizer


def batch(step: int, size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 6, generator=generator), torch.randn(size, 3, generator=generator)


def losses_of(outputs: dict[str, Tensor], y: Tensor) -> dict[str, Tensor]:
    return {task: (output - y[:, TASKS.index(task)]).square().mean() for task, output in outputs.items()}


def train(model, optimizer, regularizer, steps, tasks=lambda step: TASKS, parts: int = 1, ends: bool = True) -> None:
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        for part in torch.arange(len(x)).tensor_split([4] if parts == 2 else []):
            losses = losses_of(model(x[part], tasks(step)), y[part])
            weight = len(part) / len(x)
            (weight * (sum(losses.values()) + regularizer(losses=losses))).backward()
        if ends:
            optimizer.step()


def by_hand(
    steps: int, tasks=lambda step: TASKS, metric: str = "l1", reduction: str = "mean", share: float = 0.5
) -> list[float]:
    """The strength in each step of a training, by loops over samples, tasks and pairs."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    relations = RelationWeights(3, "entropic")
    relations.adapt_to_metric(bounded=metric in ("cosine", "sqchordal"))
    strength, limit = 0.0, None
    strengths, penalties, totals = [], [], []
    for step in range(steps):
        strengths.append(strength)
        x, y = batch(step)
        ran = tasks(step)
        saliencies: list[list[Tensor]] = [[] for _ in ran]
        for row in x:
            feature = model.backbone(row.unsqueeze(0))
            for own, task in zip(saliencies, ran):
                gradient = torch.autograd.grad(model.heads[task](feature).sum(), feature, create_graph=True)[0]
                own.append(gradient.squeeze(0))
        found = slow_distances(saliencies, metric, reduction)
        places = [TASKS.index(task) for task in ran]
        index = torch.tensor(places).unsqueeze(1), torch.tensor(places)
        distances, seen = torch.zeros(3, 3), torch.zeros(3, 3, dtype=torch.bool)
        distances[index], seen[index] = found.detach(), True
        penalty = slow_penalty(found, relations.matrix()[index])
        total = sum(losses_of(model(x, ran), y).values())
        weight = len(x) if reduction == "mean" else 1
        penalties.append(weight * penalty.detach().item())
        totals.append(weight * total.item())
        optimizer.zero_grad()
        (total + strength * penalty).backward()
        optimizer.step()
        relations.update(distances, strength, observed=seen)
        if len(penalties) == WINDOW:
            ratio = sum(totals) / sum(penalties)
            limit = share * ratio if limit is None else limit
            strength = min(share * ratio, limit)
            penalties, totals = [], []
    return strengths


@pytest.mark.parametrize(
    ("metric", "reduction"), [("l1", "mean"), ("l1", "sum"), ("cosine", "mean"), ("sqchordal", "sum")]
)
@pytest.mark.parametrize("share", [0.01, 30.0])
def test_against_loops(metric: str, reduction: str, share: float) -> None:
    """In all windows, below the limit and at it."""
    expected = by_hand(3 * WINDOW + 1, metric=metric, reduction=reduction, share=share)
    model, optimizer, regularizer = make(metric=metric, reduction=reduction, share=share)
    found = []
    for step in range(3 * WINDOW + 1):
        found.append(regularizer.current_strength)
        assert regularizer.strength == found[-1]
        train(model, optimizer, regularizer, [step])
    assert found == pytest.approx(expected, rel=1e-9)
    assert len(set(found)) >= 2


def test_how_far_it_rises_while_heads_become_alike() -> None:
    """To what makes the first penalty as large as the losses, if it trains heads alone; otherwise not at all."""
    strengths = {}
    for activation in (nn.ReLU(), nn.Tanh()):
        torch.manual_seed(0)
        model = Net()
        for head in model.heads.values():
            head[1] = activation
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        relations = RelationWeights(3, "fixed")
        regularizer = SaliencyRegularizer(
            model, "heads", strength="auto", share=0.1, metric="l1", relations=relations, optimizer=optimizer
        )
        train(model, optimizer, regularizer, [0] * WINDOW)
        first = regularizer.strength
        with torch.no_grad():
            for head in model.heads.values():
                head[2].weight.mul_(1e-3)
        train(model, optimizer, regularizer, [0] * WINDOW)
        strengths[type(activation)] = regularizer.strength / first
    assert strengths[nn.ReLU] == pytest.approx(10, rel=1e-9)
    assert strengths[nn.Tanh] == 1


def test_it_follows_the_losses_down() -> None:
    """And not up again, beyond where it was: heads that reach the backbone."""
    model, optimizer, regularizer = make(rate=0.0, relations="fixed")
    x, _ = batch(0)
    found = []
    for loss in (4.0, 1.0, 2.0, 8.0):
        for _ in range(WINDOW):
            model(x)
            regularizer(losses=torch.tensor(loss))
            optimizer.step()
        found.append(regularizer.strength)
    assert found == pytest.approx([found[0], found[0] / 4, found[0] / 2, found[0]], rel=1e-12)


def test_absent_tasks() -> None:
    some = (TASKS[:2], TASKS[1:], TASKS, TASKS[:1])
    model, optimizer, regularizer = make()
    train(model, optimizer, regularizer, range(2 * WINDOW), lambda step: some[step % 4])
    expected = by_hand(2 * WINDOW + 1, lambda step: some[step % 4])
    assert regularizer.strength == pytest.approx(expected[-1], rel=1e-10)


def test_micro_batches_are_one_batch() -> None:
    found = []
    for parts in (1, 2):
        model, optimizer, regularizer = make(share=2.0)
        train(model, optimizer, regularizer, range(2 * WINDOW + 5), parts=parts)
        found.append((regularizer.strength, model.state_dict()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    for name, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], value, rtol=1e-10, atol=1e-12)


def test_the_share_is_what_was_asked_for() -> None:
    """Where nothing else moves, the penalty is that share of the losses, whatever they are multiplied by."""
    strengths = []
    for scale in (1.0, 7.0):
        model, optimizer, regularizer = make(share=0.3, rate=0.0)
        for _ in range(WINDOW + 1):
            x, y = batch(0)
            losses = {task: scale * loss for task, loss in losses_of(model(x), y).items()}
            (sum(losses.values()) + regularizer(losses=losses)).backward()
            optimizer.step()
        assert regularizer.report.share == pytest.approx(0.3, rel=2e-2)  # the relations alone moved
        strengths.append(regularizer.strength)
    assert strengths[1] == pytest.approx(7 * strengths[0], rel=1e-12)
    _, _, twice = make(share=0.6, rate=0.0)
    assert twice.share == 0.6


def test_saliency_of_the_losses() -> None:
    model, optimizer, regularizer = make(share=0.25, rate=0.0, target="loss", relations="fixed")
    x, y = batch(0)
    for _ in range(WINDOW):
        outputs = model(x)
        losses = {task: (output - y[:, TASKS.index(task)]).square() for task, output in outputs.items()}
        (sum(loss.mean() for loss in losses.values()) + regularizer(losses=losses)).backward()
        optimizer.step()
    saliencies, total = [], 0.0
    for index, head in enumerate(model.heads.values()):
        feature = model.backbone(x).detach().requires_grad_()
        per_sample = (head(feature).squeeze(1) - y[:, index]).square()
        saliencies.append(list(torch.autograd.grad(per_sample.sum(), feature)[0]))
        total += per_sample.mean().item()
    penalty = slow_penalty(slow_distances(saliencies, "l1", "mean"), (1 - torch.eye(3)) / 3)
    assert regularizer.strength == pytest.approx(0.25 * total / float(penalty), rel=1e-12)


def test_the_training_is_that_without_a_penalty_until_it_acts() -> None:
    (model, optimizer, regularizer), (plain, plain_optimizer) = make(), make()[:2]
    train(model, optimizer, regularizer, range(WINDOW))
    train(plain, plain_optimizer, lambda losses: 0.0, range(WINDOW))
    assert_same_state(model, plain)
    train(model, optimizer, regularizer, [50])
    train(plain, plain_optimizer, lambda losses: 0.0, [50])
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters()))


def test_start_and_warm_up() -> None:
    model, optimizer, regularizer = make(start_step=3, warmup_steps=4)
    for step in range(3 + WINDOW):
        assert regularizer.current_strength == 0
        train(model, optimizer, regularizer, [step])
    for rise in (1, 2, 3, 4, 4):
        assert regularizer.current_strength == pytest.approx(regularizer.strength * rise / 4)
        train(model, optimizer, regularizer, [step])
    assert regularizer.strength > 0


def test_steps_that_measure_nothing_do_not_count() -> None:
    """Heads that begin at zero, calls that are not finite, and steps without a call."""
    model, optimizer, regularizer = make(rate=0.0)
    heads = copy.deepcopy(model.heads.state_dict())
    for parameter in model.heads.parameters():
        nn.init.zeros_(parameter)
    train(model, optimizer, regularizer, range(WINDOW + 5))
    assert regularizer.strength == 0
    model.heads.load_state_dict(heads)
    optimizer.step()
    x, y = batch(0)
    losses = losses_of(model(x), y)
    regularizer(losses={**losses, TASKS[0]: losses[TASKS[0]] * torch.nan})
    optimizer.step()
    assert regularizer.strength == 0
    train(model, optimizer, regularizer, range(WINDOW))
    assert 0 < regularizer.strength < float("inf")


@pytest.mark.parametrize("steps", [0, WINDOW + 3])
def test_losses_have_to_be_given(steps: int) -> None:
    model, optimizer, regularizer = make()
    train(model, optimizer, regularizer, range(steps))
    x, _ = batch(0)
    model(x)
    with pytest.raises(MissingArgumentError, match=r"losses=losses"):
        regularizer()
    with torch.no_grad():
        model(x)
        assert regularizer() == 0
    regularizer.strength = 0.4  # given now
    model(x)
    regularizer()
    assert regularizer.report.strength == 0.4


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"strength": 0.1, "share": 0.5}, ConfigurationError, "Leave one of them out"),
        ({"strength": "automatic"}, WrongTypeError, "'auto'"),
        ({"strength": "auto", "share": 0}, ConfigurationError, "> 0"),
        ({"strength": "auto", "share": "1"}, WrongTypeError, "share must be a number"),
    ],
)
def test_wrong_options(options: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        SaliencyRegularizer(Net(), "heads", **{"strength": 0.1, "metric": "l1", **options})


def test_it_says_what_it_does(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer, regularizer = make()
    train(model, optimizer, regularizer, range(2))
    assert "0, until 10 optimizer steps were measured, 2 so far; then the penalty is 0.5 times the task losses" in str(
        regularizer
    )
    with caplog.at_level(logging.INFO, "saliency_reg"):
        train(model, optimizer, regularizer, range(2, WINDOW + 1))
    (record,) = [record for record in caplog.records if "times the task losses" in record.getMessage()]
    assert record.args == (regularizer.strength, 0.5)
    assert "which holds the penalty at 0.5 times the task losses" in str(regularizer)
    assert f"{regularizer.report.share:.3g} times the task losses in the latest call" in str(regularizer)


def test_many_tasks_by_samples_of_them() -> None:
    """The strength of a sample of tasks is, on average, that of all."""
    found = []
    for most in (None, 2):
        model, optimizer, regularizer = make(rate=0.0, max_tasks_per_step=most, relations="fixed")
        for _ in range(WINDOW):
            x, y = batch(0, 4)
            losses = losses_of(model(x), y)
            (sum(losses.values()) + regularizer(losses=losses)).backward()
            optimizer.step()
        found.append(1 / regularizer.strength)
    assert found[1] == pytest.approx(found[0], rel=0.5)


def test_under_surgery_and_in_half_precision() -> None:
    model, optimizer, regularizer = make(surgery=PCGrad())
    train(model, optimizer, regularizer, range(WINDOW + 1))
    assert regularizer.report.penalty > 0
    torch.set_default_dtype(torch.float32)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        model, optimizer, regularizer = make(rate=0.0)
        for step in range(WINDOW):
            x, y = batch(step)
            with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
                losses = losses_of(model(x), y)
            (sum(losses.values()) + regularizer(losses=losses)).backward()
            optimizer.step()
        found.append(regularizer.strength)
    assert found[0] == pytest.approx(found[1], rel=0.02)


class TestWhatIsToldAtOnce:
    """And not in the eleventh step, in the middle of a training."""

    def test_no_second_derivative(self) -> None:
        model = Net()
        model.heads[TASKS[0]][1] = nn.Hardsigmoid()
        regularizer = SaliencyRegularizer(model, "heads")
        x, y = batch(0)
        with pytest.raises(SecondDerivativeError):
            regularizer(losses=losses_of(model(x), y))

    def test_backward_hooks(self) -> None:
        model = Net()
        model.heads[TASKS[0]].register_full_backward_hook(lambda *_: None)
        regularizer = SaliencyRegularizer(model, "heads")
        x, y = batch(0)
        with pytest.raises(ReaderError):
            regularizer(losses=losses_of(model(x), y))

    def test_losses_during_the_start(self) -> None:
        model, _, regularizer = make(start_step=100)
        model(batch(0)[0])
        with pytest.raises(MissingArgumentError):
            regularizer()

    def test_reach(self, caplog: pytest.LogCaptureFixture) -> None:
        model, _, regularizer = make()
        x, y = batch(0)
        regularizer(losses=losses_of(model(x), y))
        assert "reaches the backbone  yes" in str(regularizer)


def test_no_optimizer_is_told() -> None:
    model = Net()
    regularizer = SaliencyRegularizer(model, "heads", relations="fixed")
    x, y = batch(0)

    def call() -> None:
        for _ in range(60):
            regularizer(losses=losses_of(model(x), y))

    with pytest.warns(UserWarning, match=r"penalty has been 0 in all 30 calls so far.*Pass optimizer="):
        call()


def test_losses_that_cannot_be_measured_are_told() -> None:
    model, optimizer, regularizer = make()
    x, _ = batch(0)

    def call() -> None:
        for _ in range(100):
            model(x)
            regularizer(losses=torch.tensor(torch.inf))
            optimizer.step()

    with pytest.warns(UserWarning, match="finds no strength, because the losses"):
        call()


def test_a_batch_without_any_label() -> None:
    model, optimizer, regularizer = make(rate=0.0)
    train(model, optimizer, regularizer, range(WINDOW))
    model(batch(0)[0])
    regularizer(losses={})
    assert regularizer.report.losses == 0


def test_losses_of_either_sign() -> None:
    """A sum over the calls that happens to be near zero finds no strength near zero; what has grown is measured anew if asked."""
    model, optimizer, regularizer = make(share=0.1, rate=0.0, relations="fixed")
    x, _ = batch(0)

    def take(steps: int, loss: float) -> float:
        for step in range(steps):
            model(x)
            regularizer(losses=torch.tensor((-1) ** step * loss))
            optimizer.step()
        return regularizer.report.share

    assert take(2 * WINDOW + 1, 1.0) == pytest.approx(0.1, rel=1e-6)
    assert take(2 * WINDOW, 1e4) == pytest.approx(1e-5, rel=1e-6)
    regularizer.strength = "auto"
    assert take(WINDOW + 1, 1e4) == pytest.approx(0.1, rel=1e-6)


def test_projected_relations_do_not_depend_on_the_scale_of_the_losses() -> None:
    found = []
    for scale in (1e-3, 1e4):
        relations = RelationWeights(3, "projected", learning_rate=0.1)
        model, optimizer, regularizer = make(relations=relations)
        for step in range(3 * WINDOW):
            x, y = batch(step)
            losses = {task: scale * loss for task, loss in losses_of(model(x), y).items()}
            optimizer.zero_grad()
            ((sum(losses.values()) + regularizer(losses=losses)) / scale).backward()
            optimizer.step()
        found.append(relations.matrix())
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-9)


# State.


@pytest.mark.parametrize("surgery", [False, True])
@pytest.mark.parametrize("at", [7, WINDOW, WINDOW + 6, 2 * WINDOW])
def test_resumed_bit_for_bit(at: int, surgery: bool) -> None:
    model, optimizer, regularizer = whole = make(warmup_steps=10, surgery=PCGrad() if surgery else None)
    train(model, optimizer, regularizer, range(2 * WINDOW + 2), parts=2)
    model, optimizer, regularizer = first = make(warmup_steps=10, surgery=PCGrad() if surgery else None)
    train(model, optimizer, regularizer, range(at), parts=2)
    checkpoint = io.BytesIO()
    torch.save([part.state_dict() for part in first], checkpoint)
    checkpoint.seek(0)
    model, optimizer, regularizer = second = make(warmup_steps=10, surgery=PCGrad() if surgery else None)
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    for part, state in zip(second, torch.load(checkpoint, weights_only=True)):
        part.load_state_dict(state)
    train(model, optimizer, regularizer, range(at, 2 * WINDOW + 2), parts=2)
    assert_same_state(second[0], whole[0])
    assert_same_state(second[2], whole[2])


def test_a_checkpoint_between_micro_batches() -> None:
    model, optimizer, regularizer = make(rate=0.0)
    twin_model, twin_optimizer, twin = make(rate=0.0)
    train(model, optimizer, regularizer, range(WINDOW - 1))
    train(model, optimizer, regularizer, [80], ends=False)
    twin.load_state_dict(regularizer.state_dict())
    for own, own_optimizer, each in ((model, optimizer, regularizer), (twin_model, twin_optimizer, twin)):
        train(own, own_optimizer, each, [81])
    assert twin.strength == regularizer.strength > 0


def test_states_of_other_regularizers() -> None:
    model, optimizer, regularizer = make()
    train(model, optimizer, regularizer, range(WINDOW))
    given = SaliencyRegularizer(Net(), "heads", strength=0.2, metric="l1")
    with pytest.raises(StateMismatchError, match="strength='auto'"):
        given.load_state_dict(regularizer.state_dict())
    _, _, fresh = make()
    for own in (fresh, regularizer):  # as of an earlier version
        with pytest.warns(UserWarning, match="was saved with a number as strength"):
            own.load_state_dict(given.state_dict())
        assert own.strength == 0
        assert own.automatic_strength.first_step == -1


def test_copies_and_pickles() -> None:
    model, optimizer, regularizer = make()
    train(model, optimizer, regularizer, range(WINDOW))
    for copied in (copy.deepcopy(regularizer), pickle.loads(pickle.dumps(regularizer))):
        assert copied.strength == regularizer.strength > 0
        assert copied.share == 0.5


def test_an_average_of_states_is_measured_again() -> None:
    model, optimizer, regularizer = make()
    holder = nn.ModuleDict({"model": model, "regularizer": regularizer})
    average = torch.optim.swa_utils.AveragedModel(holder, use_buffers=True)
    for step in range(WINDOW + 3):
        train(model, optimizer, regularizer, [step])
        average.update_parameters(holder)
    averaged = average.module["regularizer"]
    with pytest.warns(UserWarning, match="measures its strength again"):
        assert averaged.current_strength == 0


def test_set_to_a_number() -> None:
    model, optimizer, regularizer = make()
    regularizer.strength = 0.3
    assert regularizer.current_strength == 0.3
    train(model, optimizer, regularizer, range(WINDOW + 2))
    assert regularizer.strength == 0.3
    assert regularizer.share is None
    for wrong in ("automatic", -1.0):
        with pytest.raises((WrongTypeError, ConfigurationError)):
            regularizer.strength = wrong
    other = make()[2]
    other.load_state_dict(regularizer.state_dict())
    assert other.current_strength == 0.3
    regularizer.strength = "auto"  # again
    assert regularizer.current_strength == 0
    assert str(regularizer.share) == "0.5"
    train(model, optimizer, regularizer, range(WINDOW))
    assert regularizer.strength > 0


def test_a_plain_model_trains_with_it() -> None:
    """Dropout, BatchNorm and momentum in float32, by the default share."""
    torch.set_default_dtype(torch.float32)
    model, optimizer = make_model()
    regularizer = SaliencyRegularizer(model, strength="auto", optimizer=optimizer, metric="l1")
    for step in range(WINDOW + 20):
        x, y = random_batch(step)
        losses = [(output - y).square().mean() for output in model(x).values()]
        optimizer.zero_grad()
        (sum(losses) + regularizer(losses=losses)).backward()
        optimizer.step()
    assert 1e-4 < regularizer.report.share < 0.01
