"""What the penalty must leave alone."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from saliency_reg import RelationWeights, SaliencyRegularizer
from saliency_reg.errors import CaptureError
from tests.support.training import TASKS, Net, assert_same_state, batch, make_model, train


@pytest.mark.parametrize("rule", ["entropic", "per_task", "projected", "authors", "fixed"])
def test_with_strength_zero_training_is_bit_identical(rule: str) -> None:
    plain, plain_optimizer = make_model()
    expected = train(plain, plain_optimizer, range(20))
    expected_random = torch.rand(5)

    model, optimizer = make_model()
    regularizer = SaliencyRegularizer(model, strength=0.0, relations=rule, optimizer=optimizer, metric="l1")
    found = train(model, optimizer, range(20), regularizer)
    assert torch.equal(torch.rand(5), expected_random)
    assert torch.equal(torch.stack(found), torch.stack(expected))
    assert_same_state(model, plain)


def test_with_strength_zero_the_relations_still_learn() -> None:
    model, optimizer = make_model()
    regularizer = SaliencyRegularizer(model, strength=0.0, optimizer=optimizer, metric="l1")
    before = regularizer.relations.matrix()
    train(model, optimizer, range(3), regularizer)
    assert not torch.equal(regularizer.relations.matrix(), before)


@pytest.mark.parametrize("view", [lambda f: f.flatten(1), lambda f: f[:, 0], lambda f: f * 1])
def test_strength_zero_where_each_head_is_given_its_own_view(view) -> None:
    """Without aliases the heads' own views are the places to differentiate at."""
    torch.manual_seed(0)
    backbone, heads = nn.Linear(4, 4), [nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)) for _ in range(3)]
    x = torch.randn(5, 1, 4)
    found = []
    for strength in (0.0, 1.0):
        with SaliencyRegularizer(backbone, heads, tasks=TASKS, strength=strength, metric="l1") as regularizer:
            feature = backbone(x)
            views = [view(feature) for _ in heads]
            for head, own in zip(heads, views):
                head(own)
            regularizer()
            assert regularizer.report is not None
            found.append(regularizer.report.distances)
    torch.testing.assert_close(found[0], found[1])


def test_strength_zero_prints_no_nan() -> None:
    model, _ = make_model()
    regularizer = SaliencyRegularizer(model, strength=0.0, metric="l1")
    model(batch(0)[0] * float("inf"))
    assert regularizer() == 0


def test_disabled_training_is_bit_identical() -> None:
    plain, plain_optimizer = make_model()
    train(plain, plain_optimizer, range(5))
    model, optimizer = make_model()
    regularizer = SaliencyRegularizer(model, strength=3.0, optimizer=optimizer, metric="l1")
    regularizer.enabled = False
    train(model, optimizer, range(5), regularizer)
    assert_same_state(model, plain)


def test_the_penalty_changes_training_and_so_these_tests_can_fail() -> None:
    plain, plain_optimizer = make_model()
    train(plain, plain_optimizer, range(2))
    model, optimizer = make_model()
    train(model, optimizer, range(2), SaliencyRegularizer(model, strength=0.1, optimizer=optimizer, metric="l1"))
    with pytest.raises(AssertionError):
        assert_same_state(model, plain)


def test_one_call_runs_nothing_again_and_draws_nothing() -> None:
    """Forwards are counted by the user's own hooks; random state, statistics and gradients are compared."""
    model, _ = make_model()
    calls: Counter[str] = Counter()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    gradients: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda _, name=name: gradients.update([name]))
    regularizer = SaliencyRegularizer(model, strength=1.0, metric="l1")
    outputs = model(batch(0)[0])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state, once = torch.get_rng_state(), dict(calls)
    penalty = regularizer()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert dict(calls) == once
    assert set(once.values()) == {1}
    assert not gradients
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())
    (sum(output.mean() for output in outputs.values()) + penalty).backward()
    assert set(gradients.values()) == {1}


def test_forward_values_are_untouched() -> None:
    model, _ = make_model()
    plain, _ = make_model()
    SaliencyRegularizer(model, strength=1.0, metric="l1")
    torch.manual_seed(5)
    found = model(batch(0)[0])
    torch.manual_seed(5)
    expected = plain(batch(0)[0])
    for task in TASKS:
        assert torch.equal(found[task], expected[task])


def test_dropped_units_are_those_of_the_forward() -> None:
    """The saliency goes through the masks that were drawn: where dropout zeroed a unit, it is zero."""
    torch.manual_seed(0)
    drop = nn.Dropout(0.5)

    class DropFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList([nn.Sequential(drop, nn.Linear(10, 1)) for _ in range(2)])
            self.masks: list[torch.Tensor] = []

        def forward(self, x):
            drop.register_forward_hook(lambda m, a, out: self.masks.append(out.detach() != 0))
            return [head(x) for head in self.heads]

    model = DropFirst()
    x = torch.ones(3, 10, requires_grad=True)
    regularizer = SaliencyRegularizer(
        model, "heads", pool=None, relations=RelationWeights(2, "fixed"), strength=1.0, metric="l1"
    )
    model(x)
    penalty = regularizer()
    rows = [head[1].weight / 0.5 for head in model.heads]
    expected = (rows[0] * model.masks[0] - rows[1] * model.masks[1]).abs().sum(1).mean()
    torch.testing.assert_close(penalty, expected)


def test_gradients_that_the_loss_did_not_produce_stay_none() -> None:
    """A head that does not run, and parameters that the penalty does not depend on."""
    model, _ = make_model()
    unused = nn.Linear(2, 2)
    model.unused = unused
    regularizer = SaliencyRegularizer(model, "heads", strength=1.0, metric="l1")
    feature = model.backbone(batch(0)[0])
    model.heads["left"](feature)
    model.heads["right"](feature)
    regularizer().backward()
    assert unused.weight.grad is None
    assert all(parameter.grad is None for parameter in model.heads["up"].parameters())
    assert model.heads["left"].out.bias.grad is None
    assert model.heads["left"].out.weight.grad is not None


def test_inactive_under_no_grad_and_in_inference_mode() -> None:
    model, _ = make_model()
    regularizer = SaliencyRegularizer(model, strength=1.0, metric="l1")
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert regularizer() == 0  # before any forward
            model(batch(0)[0])
            penalty = regularizer()
        assert penalty == 0
        assert not penalty.requires_grad
        assert penalty.device == batch(0)[0].device
    assert regularizer() == 0  # outside, but the latest forward ran without gradients
    assert regularizer.report is None


def test_a_forward_without_gradients_does_not_displace_one_that_waits() -> None:
    """As with a teacher, or an evaluation between forward and loss."""
    model, _ = make_model()
    model.eval()
    regularizer = SaliencyRegularizer(model, strength=1.0, relations="fixed", metric="l1")
    model(batch(0)[0])
    expected = regularizer()
    model(batch(0)[0])
    with torch.no_grad():
        model(batch(1)[0])
    assert torch.equal(regularizer(), expected)


def test_a_call_without_gradients_drops_the_forward() -> None:
    model, _ = make_model()
    regularizer = SaliencyRegularizer(model, strength=1.0, metric="l1")
    model(batch(0)[0])
    with torch.no_grad():
        assert regularizer() == 0
    with pytest.raises(CaptureError, match="dropped by a call without gradients"):
        regularizer()


def test_heads_called_one_by_one_after_an_unread_forward() -> None:
    """They are a forward of their own; a single head of it is not."""
    model, _ = make_model()
    model.eval()
    regularizer = SaliencyRegularizer(model, strength=1.0, relations="fixed", feature="backbone", metric="l1")
    model(batch(1)[0])
    expected = regularizer()
    model(batch(0)[0])
    for _ in range(2):
        feature = model.backbone(batch(1)[0])
        for head in model.heads.values():
            head(feature)
    with pytest.warns(UserWarning, match="3 forwards ran before this call"):
        assert torch.equal(regularizer(), expected)
    model(batch(0)[0])
    model.heads["left"](feature)
    with pytest.raises(CaptureError, match=r"heads \['heads.left'\] ran again on their own"):
        regularizer()


def test_the_latest_forward_counts() -> None:
    model, _ = make_model()
    model.eval()
    regularizer = SaliencyRegularizer(model, strength=1.0, relations="fixed", metric="l1")
    model(batch(1)[0])
    expected = regularizer()
    model(batch(0)[0])
    model(batch(1)[0])
    with pytest.warns(UserWarning, match="2 forwards ran before this call"):
        assert torch.equal(regularizer(), expected)


@pytest.mark.parametrize("modes", [(0, 0, 1), (0, 1), (0, 1, 1), (1, 0), (1, 0, 1)])
def test_evaluations_with_gradients_between_two_steps(modes: tuple[int, ...]) -> None:
    """As loops have them that evaluate without no_grad: only training forwards before one of training are told of."""
    model, _ = make_model()
    regularizer = SaliencyRegularizer(model, strength=1.0, metric="l1")
    for mode in modes:
        model.train(bool(mode))
        model(batch(0)[0])
    unread = sum(modes[:-1]) if modes[-1] else len(modes) - 1
    told = pytest.warns(UserWarning, match=f"{unread + 1} forwards ran") if unread else nullcontext()
    with told:
        regularizer()


def test_eval_mode_is_not_consulted() -> None:
    model, _ = make_model()
    model.eval()
    regularizer = SaliencyRegularizer(model, strength=1.0, metric="l1")
    model(batch(0)[0])
    assert regularizer() > 0


def test_outputs_without_a_graph_give_zero() -> None:
    model, _ = make_model()
    model.requires_grad_(False)
    regularizer = SaliencyRegularizer(model, strength=1.0, metric="l1")
    outputs = model(batch(0)[0])
    assert not any(output.requires_grad for output in outputs.values())
    assert regularizer() == 0


def test_user_hooks_stay_in_place() -> None:
    model = Net()
    head = model.heads["left"]
    seen: list[str] = []
    head.register_forward_pre_hook(lambda m, a: seen.append("before"))
    head.register_forward_hook(lambda m, a, o: seen.append("after"))
    before = {name: dict(vars(head)[name]) for name in ("_forward_hooks", "_forward_pre_hooks")}
    regularizer = SaliencyRegularizer(model, strength=0.1, metric="l1")
    model(batch(0)[0])
    regularizer()
    assert seen == ["before", "after"]
    regularizer.remove()
    assert {name: dict(vars(head)[name]) for name in before} == before
