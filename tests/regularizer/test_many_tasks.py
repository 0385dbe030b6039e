"""A regularizer of very many tasks touches a sample of them, and nothing else changes."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from saliency_reg import SaliencyRegularizer
from saliency_reg.integrations.shared.report_figures import figures_of
from saliency_reg.regularizer import penalty as penalty_module
from saliency_reg.relations import rules
from tests.support.many_tasks import RULES, Run


@pytest.mark.parametrize("case", RULES)
def test_a_sampled_run_is_the_one_that_deals_with_all_pairs(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"warmup_steps": 3, "start_step": 1}
    few = Run(150, case, **options)
    penalties = few.steps(range(5), 3)
    monkeypatch.setattr(penalty_module, "ALL_PAIRS", 1000)
    every = Run(150, case, **options)
    torch.testing.assert_close(penalties, every.steps(range(5), 3), rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(few.net.state_dict(), every.net.state_dict(), rtol=1e-11, atol=1e-13)
    state, expected = few.regularizer.state_dict(), every.regularizer.state_dict()
    torch.testing.assert_close(dict(state), dict(expected), rtol=1e-11, atol=1e-13)
    found, whole = few.regularizer.report, every.regularizer.report
    torch.testing.assert_close(found.distances, whole.distances, rtol=1e-10, atol=1e-13, equal_nan=True)
    assert found.present == whole.present
    assert len(found.present) == 10
    known = ~found.relations.isnan()
    assert int(known.sum()) == 100
    torch.testing.assert_close(found.relations[known], whole.relations[known], rtol=1e-10, atol=0)


@pytest.mark.parametrize("case", ["entropic", "per_task", "projected", "authors", "fixed"])
def test_resumed_between_two_calls(case: str) -> None:
    run = Run(150, case)
    run.steps(range(5), 2)
    run.optimizer.zero_grad()
    run.call(1000)
    again = Run(150, case)
    again.net.load_state_dict(run.net.state_dict())
    again.regularizer.load_state_dict(copy.deepcopy(run.regularizer.state_dict()))
    for one, other in zip(run.net.parameters(), again.net.parameters()):
        other.grad = one.grad.clone()
    for one in (run, again):
        one.call(1001)
        one.optimizer.step()
    assert torch.equal(torch.stack(run.steps(range(5, 9), 2)), torch.stack(again.steps(range(5, 9), 2)))
    for name, value in run.regularizer.state_dict().items():
        assert torch.equal(value, again.regularizer.state_dict()[name]), name
    assert not run.regularizer.pending.samples.any()
    assert not run.regularizer.pending.distances.any()


@pytest.mark.parametrize("sample", [4, 10])
@pytest.mark.parametrize("case", ["projected", "authors", "entropic"])
def test_resumed_between_two_steps(case: str, sample: int) -> None:
    """Sums over all pairs, most of them zeros, would round in another way than those over the pairs that were seen."""
    run = Run(150, case, sample)
    run.steps(range(3), 2)
    again = Run(150, case, sample)
    again.net.load_state_dict(copy.deepcopy(run.net.state_dict()))
    again.regularizer.load_state_dict(copy.deepcopy(run.regularizer.state_dict()))
    for number in range(3, 10):
        assert torch.equal(*(torch.stack(one.steps(range(number, number + 1), 2)) for one in (run, again))), number
        assert torch.equal(run.regularizer.relations.matrix(), again.regularizer.relations.matrix()), number


class Separate(nn.Module):
    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.backbone = nn.Linear(5, 8)
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1)) for _ in range(tasks))

    def forward(self, x: Tensor, ran: list[int]) -> list[Tensor]:
        feature = self.backbone(x)
        return [self.heads[task](feature) for task in ran]


@pytest.mark.parametrize("sample", [None, 5])
def test_heads_that_did_not_run(sample: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[list[Tensor], Tensor]:
        torch.manual_seed(0)
        net, found = Separate(140).double(), []
        regularizer = SaliencyRegularizer(net, heads="heads", max_tasks_per_step=sample, strength=2.0, metric="l1")
        for number in range(5):
            ran = random.Random(number).sample(range(140), 1 if number == 2 else 9)
            outputs = net(torch.randn(3, 5, generator=torch.Generator().manual_seed(number)).double(), ran)
            penalty = regularizer(losses=sum(output.mean() for output in outputs))
            found += [penalty, *(torch.autograd.grad(penalty, net.backbone.weight) if number != 2 else ())]
            assert len(regularizer.report.present) == min(len(ran), sample or 9)
            regularizer.step()
        return found, regularizer.relations.matrix()

    few = run()
    monkeypatch.setattr(penalty_module, "ALL_PAIRS", 1000)
    torch.testing.assert_close(few, run(), rtol=1e-11, atol=1e-14)


def test_with_few_tasks_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the limit all pairs are dealt with, and to the bit."""
    run = Run(40)
    monkeypatch.setattr(penalty_module, "ALL_PAIRS", 1000)
    assert torch.equal(torch.stack(run.steps(range(4), 2)), torch.stack(Run(40).steps(range(4), 2)))
    assert not run.regularizer.report.relations.isnan().any()


def test_the_mean_over_all_samples_is_the_penalty_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(penalty_module, "ALL_PAIRS", 0)
    monkeypatch.setattr(rules, "MANY_PAIRS", 0)
    whole = Run(5, sample=None)
    whole.steps(range(2))
    sampled = Run(5, sample=2)
    sampled.net.load_state_dict(whole.net.state_dict())
    state = {name: value for name, value in whole.regularizer.state_dict().items() if name.startswith("relations.")}
    sampled.regularizer.load_state_dict(state, strict=False)
    found: dict[tuple[str, ...], Tensor] = {}
    for _ in range(90):
        penalty = sampled.call(7)
        found[sampled.regularizer.report.present] = penalty
    assert len(found) == 10
    torch.testing.assert_close(sum(found.values()) / 10, whole.call(7), rtol=1e-12, atol=0)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that was made: not a view of another one, nor one that was written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.what = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        flat = torch.utils._pytree.tree_leaves
        given = {one.untyped_storage().data_ptr() for one in flat((args, kwargs)) if isinstance(one, Tensor)}
        for one in flat(result):
            made = isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in given
            if made and one.numel() > self.numel:
                self.numel, self.what = one.numel(), str(func)
        return result


@pytest.mark.parametrize("case", ["entropic", "entropic, its own scale", "projected", "authors", "fixed"])
def test_no_matrix_of_all_tasks_is_made(case: str) -> None:
    tasks = 400
    run = Run(tasks, case)
    run.steps(range(1), 2)
    with Largest() as largest:
        run.steps(range(1, 4), 2)
        assert run.regularizer.report.share > 0
    assert 0 < largest.numel < tasks * tasks / 8, largest.what
    with Largest() as largest:
        assert run.regularizer.report.distances.shape == (tasks, tasks)
    assert largest.numel == tasks * tasks


def test_the_report_of_a_sample() -> None:
    run = Run(150)
    run.net(torch.randn(6, 5).double())
    run.regularizer(losses=torch.tensor(2.0))
    report = run.regularizer.report
    again = pickle.loads(pickle.dumps(report))
    assert report.distances is report.distances
    assert report.samples.tolist() == [6.0 * (task in report.present) for task in report.tasks]
    by_hand = 150 * 149 / 90 * 0.5 * (report.distances * report.relations).nan_to_num(0.0).triu(1).sum()
    torch.testing.assert_close(report.penalty, by_hand)
    for name in ("samples", "distances", "relations"):
        torch.testing.assert_close(getattr(again, name), getattr(report, name), rtol=0, atol=0, equal_nan=True)
    assert len(report.to_dict()["relations"]) == 150
    assert "relations=tensor" in repr(report)
    figures = figures_of(report, 3, "srdml")
    assert figures["srdml/relation_max"] == float(report.relations.nan_to_num(0.0).max())
    assert len([name for name in figures if name.startswith("srdml/distance/")]) == 3
    with pytest.raises(AttributeError, match="no attribute 'figures'"):
        report.figures  # noqa: B018
