"""Methods that weigh the losses, against plain loops, also where tasks are absent."""

import io
import math
import pickle

import numpy as np
import pytest
import torch

from recipes.data.task_kinds import BINARY, TaskKind
from recipes.methods.loss_weightings import UNCERTAINTY, torchjd_loss_weighting
from recipes.runtime.errors import OptionError

scalarization = pytest.importorskip("torchjd.scalarization")

KINDS = {"a": BINARY, "b": TaskKind("number"), "c": TaskKind("classes", 4), "d": TaskKind("number")}
ALL = torch.ones(4, dtype=torch.bool)
SOME = torch.tensor([True, True, False, True])
USABLE = ("UW", "FAMO", "IMTLL", "GeometricMean", "STCH", "DWA", "Random", "Mean", "Sum")


def losses_of(step):
    generator = torch.Generator().manual_seed(step)
    return (torch.rand(4, generator=generator) + 0.1).requires_grad_()


def without_unknown(losses, known):
    return torch.where(known, losses, torch.full_like(losses, math.nan))


class TestUncertaintyWeighting:
    @pytest.mark.parametrize("known", [ALL, SOME])
    def test_it_equals_a_loop_over_the_terms_of_the_paper(self, known):
        weights = UNCERTAINTY.build(KINDS)
        (logs,) = weights.parameters()
        with torch.no_grad():
            logs.copy_(torch.tensor([0.3, -0.2, 0.9, 0.1]))
        losses = losses_of(0)
        total = weights(without_unknown(losses, known), known)
        wanted = 0.0
        for kind, loss, own, there in zip(KINDS.values(), losses.tolist(), logs.tolist(), known.tolist()):
            if there:
                wanted += (0.5 if kind.name == "number" else 1.0) * math.exp(-own) * loss + 0.5 * own
        assert total.item() == pytest.approx(wanted, rel=1e-6)
        total.backward()
        assert bool((logs.grad[~known] == 0).all())
        assert bool((logs.grad[known] != 0).all())

    def test_learned_uncertainties_are_the_closed_form_and_absent_ones_stay(self):
        weights = UNCERTAINTY.build(KINDS)
        (logs,) = weights.parameters()
        optimizer = torch.optim.SGD(weights.parameters(), lr=0.5)
        losses = torch.tensor([0.2, 0.7, 0.4, 1.5])
        for _ in range(300):
            optimizer.zero_grad()
            total = weights(losses, SOME)
            total.backward()
            optimizer.step()
        twice = torch.tensor([2.0, 1.0, 2.0, 1.0])
        torch.testing.assert_close(logs.detach()[SOME], (twice * losses).log()[SOME], rtol=1e-4, atol=1e-4)
        assert logs[2].item() == 0
        wanted = sum(0.5 * (1 + math.log(two * loss)) for two, loss, there in zip(twice, losses, SOME) if there)
        assert total.item() == pytest.approx(wanted, abs=1e-4)


class TestThoseOfTorchJD:
    @pytest.mark.parametrize("name", ["UW", "FAMO", "IMTLL", "GeometricMean", "STCH", "Mean", "Sum"])
    def test_absent_tasks_are_as_if_they_were_no_tasks(self, name):
        weights = torchjd_loss_weighting(name).build(KINDS)
        small = torchjd_loss_weighting(name).build({task: KINDS[task] for task in "abd"})
        for large, own in zip(weights.parameters(), small.parameters()):
            with torch.no_grad():
                large.copy_(torch.tensor([0.3, -0.2, 0.9, 0.1]))
                own.copy_(large[SOME])
        losses, few = losses_of(1), losses_of(1)
        total = weights(without_unknown(losses, SOME), SOME)
        other = small(few[SOME], ALL[:3])
        torch.testing.assert_close(total, other)
        for own in (total, other):
            own.backward()
        torch.testing.assert_close(losses.grad.nan_to_num()[SOME], few.grad[SOME])

    @pytest.mark.parametrize("name", USABLE)
    def test_each_is_that_of_torchjd_where_all_tasks_are_there(self, name):
        chosen = torchjd_loss_weighting(name)
        kind = getattr(scalarization, name)
        alone = kind(4) if name in ("UW", "IMTLL", "FAMO") else kind(0.1) if name == "STCH" else kind()
        weights = chosen.build(KINDS)
        for step in range(6):
            found = []
            for own in (weights, alone):
                torch.manual_seed(step)
                losses = losses_of(step)
                total = own(losses, ALL) if own is weights else own(losses)
                total.backward()
                found.append((total.detach(), losses.grad))
                after = losses.detach() * torch.tensor([0.5, 0.9, 0.7, 0.8])
                if chosen.after == "step":
                    own.after_step(after) if own is weights else own.update(after)
                if chosen.after == "epoch" and step % 2:
                    own.after_epoch() if own is weights else own.step()
            torch.testing.assert_close(found[0][0], found[1][0])
            torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)
        assert chosen.after == {"FAMO": "step", "DWA": "epoch"}.get(name, "")
        assert chosen.splittable == (name == "Sum")

    @pytest.mark.parametrize("name", USABLE)
    def test_each_reaches_workers_and_resumes_bit_for_bit(self, name):
        chosen = pickle.loads(pickle.dumps(torchjd_loss_weighting(name)))

        def built():
            weights = chosen.build(KINDS)
            return weights, torch.optim.Adam([torch.zeros(1, requires_grad=True), *weights.parameters()], lr=0.1)

        def train(parts, steps):
            weights, optimizer = parts
            found = []
            for step in steps:
                torch.manual_seed(step)
                known = SOME if step % 3 == 1 else ALL
                losses = losses_of(step)
                optimizer.zero_grad()
                weights(losses, known).backward()
                optimizer.step()
                if chosen.after == "step":
                    weights.after_step(losses.detach() * torch.tensor([0.5, 0.9, 0.7, 0.8]))
                if chosen.after == "epoch" and step % 2:
                    weights.after_epoch()
                found.append(losses.grad)
            return torch.stack(found)

        whole, first, second = built(), built(), built()
        wanted = train(whole, range(10))
        train(first, range(5))
        file = io.BytesIO()
        torch.save([part.state_dict() for part in first], file)
        file.seek(0)
        for new, state in zip(second, torch.load(file, weights_only=True)):
            new.load_state_dict(state)
        assert torch.equal(train(second, range(5, 10)), wanted[5:])
        assert bool(torch.isfinite(wanted).all())

    @pytest.mark.parametrize("name", USABLE)
    def test_a_step_without_any_label_has_a_loss_of_zero(self, name):
        weights = torchjd_loss_weighting(name).build(KINDS)
        losses = losses_of(0)
        total = weights(losses, ~ALL)
        assert total.item() == 0
        total.backward()
        assert losses.grad.tolist() == [0.0] * 4

    def test_an_absent_task_leaves_the_update_of_famo_among_the_others_as_it_is(self):
        """The derivative of the weights by the formula of the paper, among the tasks that are there."""
        weights = torchjd_loss_weighting("FAMO").build(KINDS)
        (logits,) = weights.parameters()
        with torch.no_grad():
            logits.copy_(torch.tensor([0.3, -0.2, 0.9, 0.1]))
        before, after = losses_of(0), losses_of(1).detach()
        weights(before, SOME)
        own = np.exp(logits.detach().numpy()[SOME.numpy()])
        shares = own / own.sum()
        falls = (before.detach().log() - after.log()).numpy()[SOME.numpy()]
        wanted = shares * (falls - (shares * falls).sum())  # of softmax, times delta
        kept = logits.detach().clone()
        weights.after_step(after)
        moved = (logits.detach() - kept)[SOME]
        decay = 1e-3 * kept[SOME]
        assert np.array_equal(
            np.sign(moved.numpy()), -np.sign(wanted * float(own.sum() / kept.exp().sum()) + decay.numpy())
        )
        # Adam's first step is the learning rate against the sign of the derivative; of the absent task, its decay alone.
        assert (logits.detach() - kept)[2].item() == pytest.approx(-0.025, rel=1e-2)

    def test_famo_wants_to_be_told(self):
        weights = torchjd_loss_weighting("FAMO").build(KINDS)
        weights(losses_of(0), ALL)
        with torch.no_grad():
            assert weights(losses_of(1), ALL).item() == pytest.approx(losses_of(1).sum().item())
        with pytest.raises(OptionError, match=r"call \.after_step"):
            weights(losses_of(1), ALL)

    def test_an_absent_task_leaves_the_means_of_dwa_as_they_are(self):
        """Its weights by the formula of the paper, from mean losses over the steps in which a task is there."""
        weights = torchjd_loss_weighting("DWA").build(KINDS)
        means = []
        for epoch in range(2):
            seen: list[list[float]] = [[] for _ in KINDS]
            for step in range(3):
                known = SOME if step == 2 else ALL
                losses = losses_of(10 * epoch + step)
                weights(losses, known)
                for own, loss, there in zip(seen, losses.tolist(), known.tolist()):
                    own += [loss] if there else []
            weights.after_epoch()
            means.append(np.array([np.mean(own) for own in seen]))
        rates = np.exp(means[1] / means[0] / 2)
        losses = losses_of(99)
        weights(losses, SOME).backward()
        wanted = 4 * rates / rates.sum() * SOME.numpy()
        assert losses.grad.numpy() == pytest.approx(wanted, rel=1e-5)

    @pytest.mark.parametrize(
        ("name", "why"),
        [("Ghost", "no scalarizer 'Ghost'. Use one of DWA, "), ("PBI", "preference"), ("COSMOS", "preference")],
    )
    def test_what_cannot_be_used_is_told(self, name, why):
        with pytest.raises(OptionError, match=why):
            torchjd_loss_weighting(name)
