"""The kinds of gradient surgery: exact solutions, and those of TorchJD by name."""

import io
import itertools
import pickle

import pytest
import torch
from torch import nn

from recipes.methods.surgeries import (
    MGDA_UB,
    MGDA_UB_UNIT,
    shortest_combination,
    shortest_combination_of_unit_gradients,
    torchjd_surgery,
)
from recipes.runtime.errors import OptionError
from saliency_reg import FeatureSurgery, ParameterSurgery

USABLE = ("UPGrad", "MGDA", "PCGrad", "GradVac", "IMTLG", "AlignedMTL", "DualProj", "PCD", "FairGrad", "Mean", "Random")


def gramian_of(tasks, size, seed, scales=None):
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(tasks, size, generator=generator, dtype=torch.float64)
    if scales is not None:
        gradients *= 10 ** (scales * torch.randn(tasks, 1, generator=generator, dtype=torch.float64))
    return gradients @ gradients.T


def by_enumeration(gramian):
    """The shortest convex combination over all sets of gradients that may have a weight."""
    best, shortest = None, float("inf")
    for count in range(1, len(gramian) + 1):
        for some in itertools.combinations(range(len(gramian)), count):
            own = gramian[list(some)][:, list(some)]
            weights = torch.linalg.pinv(own, hermitian=True).sum(1)
            weights = weights / weights.sum()
            if bool((weights >= 0).all()) and float(weights @ own @ weights) < shortest:
                shortest = float(weights @ own @ weights)
                best = torch.zeros(len(gramian), dtype=torch.float64)
                best[list(some)] = weights
    return best


class TestTheShortestCombination:
    @pytest.mark.parametrize("scales", [0.0, 1.0])
    @pytest.mark.parametrize(("tasks", "size"), [(2, 5), (3, 2), (10, 20), (40, 30)])
    def test_it_meets_the_conditions_of_optimality(self, tasks, size, scales):
        for seed in range(5):
            gramian = gramian_of(tasks, size, seed, scales)
            weights = shortest_combination(gramian)
            products = gramian @ weights
            length = float(weights @ products)
            tolerance = 1e-10 * float(gramian.diagonal().max())
            assert float(weights.min()) >= 0
            assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
            assert float(products.min()) >= length - tolerance
            assert bool(((products - length).abs()[weights > 0] <= tolerance).all())

    def test_it_equals_the_best_of_all_active_sets(self):
        for seed in range(10):
            gramian = gramian_of(5, 6, seed, 0.5)
            torch.testing.assert_close(shortest_combination(gramian), by_enumeration(gramian), rtol=1e-8, atol=1e-8)

    def test_two_tasks_have_a_closed_form(self):
        for seed in range(10):
            gramian = gramian_of(2, 3, seed)
            (one, product), (_, other) = gramian.tolist()
            share = min(max((other - product) / (one + other - 2 * product), 0), 1)
            assert shortest_combination(gramian).tolist() == pytest.approx([share, 1 - share], abs=1e-10)

    def test_a_scale_and_the_order_change_nothing(self):
        gramian = gramian_of(6, 8, 0)
        order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(shortest_combination(1e12 * gramian), shortest_combination(gramian))
        torch.testing.assert_close(shortest_combination(gramian[order][:, order]), shortest_combination(gramian)[order])

    def test_it_is_better_than_the_iterative_solver(self):
        aggregation = pytest.importorskip("torchjd.aggregation")
        for seed in range(5):
            gramian = gramian_of(10, 20, seed, 1.0)
            exact, iterated = shortest_combination(gramian), aggregation.MGDAWeighting()(gramian)
            assert float(exact @ gramian @ exact) <= float(iterated @ gramian @ iterated) * (1 + 1e-12)

    def test_equal_gradients_and_opposite_ones(self):
        assert shortest_combination(torch.ones(3, 3)).sum().item() == pytest.approx(1)
        assert shortest_combination(torch.tensor([[1.0, -1.0], [-1.0, 1.0]])).tolist() == pytest.approx([0.5, 0.5])

    def test_that_of_unit_gradients_does_not_see_lengths(self):
        gramian = gramian_of(4, 6, 0)
        sizes = torch.tensor([1.0, 10.0, 0.1, 5.0], dtype=torch.float64)
        other = gramian * sizes * sizes.unsqueeze(1)
        found = shortest_combination_of_unit_gradients(gramian)
        torch.testing.assert_close(shortest_combination_of_unit_gradients(other), found)

    def test_both_reach_worker_processes(self):
        for surgery in (MGDA_UB, MGDA_UB_UNIT):
            assert pickle.loads(pickle.dumps(surgery)) == surgery


def model_of():
    torch.manual_seed(0)
    heads = nn.ModuleDict({task: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)) for task in "abc"})
    return nn.ModuleDict({"backbone": nn.Linear(5, 6), "heads": heads}).double()


def losses_of(model, step, absent=None):
    generator = torch.Generator().manual_seed(step)
    feature = model["backbone"](torch.randn(8, 5, generator=generator, dtype=torch.float64))
    targets = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    return {
        task: (head(feature).squeeze(1) - targets[:, place]).square().mean()
        for place, (task, head) in enumerate(model["heads"].items())
        if task != absent
    }


class TestThoseOfTorchJD:
    @pytest.mark.parametrize("level", ["", "@parameters"])
    @pytest.mark.parametrize("name", USABLE)
    def test_each_trains_and_resumes_bit_for_bit(self, name, level):
        pytest.importorskip("torchjd.aggregation")
        surgery = pickle.loads(pickle.dumps(torchjd_surgery(name + level)))
        assert surgery.on_parameters == bool(level)

        def built():
            model = model_of()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            weighting = surgery.weighting(3)
            if level:
                return model, optimizer, ParameterSurgery(model, weighting, tasks=list("abc"), shared="backbone")
            return model, optimizer, FeatureSurgery(model, heads="heads", weighting=weighting)

        def train(parts, steps):
            model, optimizer, attached = parts
            for step in steps:
                losses = losses_of(model, step, absent="b" if step in (1, 4) else None)
                optimizer.zero_grad()
                if level:
                    attached.backward(losses)
                else:
                    sum(losses.values()).backward()
                optimizer.step()

        whole, first, second = built(), built(), built()
        before = torch.get_rng_state()
        train(whole, range(6))
        assert torch.equal(torch.get_rng_state(), before)  # its draws are its own
        train(first, range(3))
        file = io.BytesIO()
        torch.save([part.state_dict() for part in first], file)
        file.seek(0)
        for new, state in zip(second, torch.load(file, weights_only=True)):
            new.load_state_dict(state)
        train(second, range(3, 6))
        for one, other in zip(whole[0].parameters(), second[0].parameters()):
            assert torch.equal(one, other)
        assert bool(torch.isfinite(whole[0]["backbone"].weight).all())

    def test_the_seed_counts(self):
        pytest.importorskip("torchjd.aggregation")
        draw = torchjd_surgery("Random").weighting
        gramian = torch.eye(4)
        assert torch.equal(draw(0)(gramian), draw(0)(gramian))
        assert not torch.equal(draw(0)(gramian), draw(1)(gramian))
        one = draw(0)
        assert not torch.equal(one(gramian), one(gramian))

    @pytest.mark.parametrize(
        ("name", "why"),
        [
            ("Ghost", "has no weighting 'Ghost'. Use one of AlignedMTL, "),
            ("GradDrop", "no weighted sum"),
            ("ExcessMTL", "state of each parameter"),
            ("MoDo", "two batches"),
            ("UPGrad@heads", "or UPGrad@parameters"),
        ],
    )
    def test_what_cannot_be_used_is_told(self, name, why):
        pytest.importorskip("torchjd.aggregation")
        with pytest.raises(OptionError, match=why):
            torchjd_surgery(name)
