"""Processes whose batches differ: the right numbers or an error on all of them, never a hang."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from saliency_reg import ParameterSurgery, PCGrad, RelationWeights, SaliencyRegularizer
from tests.reference.slow_ranks import slow_joined_step
from tests.reference.slow_surgery import textbook_pcgrad
from tests.support.two_processes import run_on_two_processes
from tests.support.zoo import TASKS, build

from .support import STRENGTH, Selective, build_model, error_of, losses_of, quiet, share


class ReturnsFeature(Selective):
    """DistributedDataParallel wants each process to have a backward pass, also one without heads."""

    def forward(self, x: Tensor, ran: tuple[str, ...] = TASKS) -> tuple[dict[str, Tensor], Tensor]:
        feature = self.feature_map(x)
        return self.from_feature(feature, ran), feature


def lonely_rank(rank: int, what: str, surgery: bool) -> tuple[dict[str, Tensor | None], Tensor, list[float]]:
    quiet()
    inner = ReturnsFeature().double()
    inner.load_state_dict(build_model().state_dict())
    model = DistributedDataParallel(inner, find_unused_parameters=True)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    regularizer = SaliencyRegularizer(
        model, "heads", strength=STRENGTH, optimizer=optimizer, surgery=PCGrad() if surgery else None, metric="l1"
    )
    mine = share(rank)
    if rank == 1 and what == "no heads":
        mine = share(rank, ran=())
    elif rank == 1 and what == "one head":
        mine = share(rank, ran=TASKS[:1])
    elif rank == 1:
        mine = share(rank, size=0)
    outputs, feature = model(mine.inputs, mine.ran)
    losses = losses_of(outputs, mine.targets) if len(mine.inputs) else {}
    nothing = 0 * sum((output.sum() for output in outputs.values()), start=feature.sum())
    (sum(losses.values()) + nothing + regularizer()).backward()
    gradients = {name: parameter.grad for name, parameter in inner.named_parameters()}
    optimizer.step()
    return gradients, regularizer.relations.matrix(), regularizer.report.samples.tolist()


class TestBatches:
    @pytest.mark.parametrize("surgery", [False, True])
    @pytest.mark.parametrize("what", ["no heads", "one head", "no samples"])
    def test_nothing_or_little_on_one_process(self, what: str, surgery: bool) -> None:
        model = build_model()
        second = {"no heads": share(1, ran=()), "one head": share(1, ran=TASKS[:1]), "no samples": share(1, size=0)}[
            what
        ]
        relations = RelationWeights(3)

        def losses(outputs: dict[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
            return losses_of(outputs, targets) if len(targets) else {}

        combine = (lambda gradients: textbook_pcgrad(gradients, PCGrad().order(3, 0))) if surgery else None
        expected = slow_joined_step(
            model, TASKS, [share(0), second], losses, relations.matrix(), STRENGTH, combine=combine
        )
        relations.update(expected.distances, STRENGTH)
        first, other = run_on_two_processes(lonely_rank, what, surgery)
        for gradients, matrix, samples in (first, other):
            for name, wanted in expected.gradients.items():
                torch.testing.assert_close(gradients[name], wanted, rtol=1e-10, atol=1e-10, msg=name)
            torch.testing.assert_close(matrix, relations.matrix(), rtol=1e-10, atol=1e-10)
            assert samples == expected.samples.diagonal().tolist()
        assert torch.equal(first[1], other[1])

    @pytest.mark.parametrize("strength", [0.0, STRENGTH])
    def test_surgery_with_losses_that_reach_no_head_on_one_process(self, strength: float) -> None:
        """The others do not wait for it."""
        model = build_model()
        expected = slow_joined_step(
            model,
            TASKS,
            [share(0), share(1)],
            lambda outputs, targets: losses_of(outputs, targets) if torch.equal(targets, share(0).targets) else {},
            RelationWeights(3).matrix(),
            strength,
            combine=lambda gradients: textbook_pcgrad(gradients, PCGrad().order(3, 0)),
        )
        for gradients in run_on_two_processes(no_losses, strength):
            for name, wanted in expected.gradients.items():
                torch.testing.assert_close(gradients[name], wanted, rtol=1e-10, atol=1e-10, msg=name)

    def test_no_two_heads_on_any_process(self) -> None:
        """There is no distance, and nobody is left alone with an error."""
        for samples, penalty, present, share_of_losses in run_on_two_processes(single_heads):
            assert samples == [4.0, 0.0, 0.0]
            assert penalty == 0
            assert present == ("first",)
            assert share_of_losses == 0

    @pytest.mark.parametrize("columns", ["linear columns", "mlp columns"])
    def test_no_samples_for_a_head_with_columns_under_surgery(self, columns: str) -> None:
        first, second = run_on_two_processes(empty_columns, columns)
        for ours, theirs in zip(first, second):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
            assert bool(torch.isfinite(ours).all())

    def test_no_heads_anywhere_is_an_error(self) -> None:
        for found, text in run_on_two_processes(no_heads_anywhere):
            assert found == "NoHeadRanError"
            assert "no head ran in the latest forward" in text

    def test_a_loss_that_is_nan_on_one_process(self) -> None:
        """It skips the step of all processes; the relations are those of all, and finite."""
        first, second = run_on_two_processes(nan_on_one, "loss")
        assert torch.equal(first[0], second[0])
        assert bool(torch.isfinite(first[0]).all())
        assert math.isnan(first[1])
        assert math.isnan(second[1])
        assert first[2] == second[2] == 0  # the scaler skipped

    def test_outputs_that_are_nan_on_one_process_move_nothing(self) -> None:
        first, second = run_on_two_processes(nan_on_one, "inputs")
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[0], RelationWeights(3).matrix())

    def test_check_finite_raises_on_all(self) -> None:
        for found, text in run_on_two_processes(not_finite_on_one):
            assert found == "NonFiniteError"
            assert "of all processes" in text

    def test_sampled_tasks_are_the_same_where_tasks_are_absent(self) -> None:
        first, second = run_on_two_processes(sampled)
        assert first[0] == second[0]
        assert len({tuple(present) for present in first[0]}) > 1
        assert torch.equal(first[1], second[1])


def single_heads(rank: int) -> tuple[list[float], float, tuple[str, ...], float | None]:
    model = build_model()
    regularizer = SaliencyRegularizer(model, "heads", strength=0.1, metric="l1")
    mine = share(rank, ran=() if rank else TASKS[:1])
    losses = losses_of(model(mine.inputs, mine.ran), mine.targets)
    penalty = regularizer(losses=losses)
    report = regularizer.report
    return report.samples.tolist(), penalty.item(), report.present, report.share


def empty_columns(rank: int, name: str) -> list[Tensor]:
    quiet()
    entry = build(name)
    model = DistributedDataParallel(entry.model)
    regularizer = SaliencyRegularizer(model, strength=0.1, surgery=PCGrad(), **{"metric": "l1", **entry.options})
    outputs = model(entry.inputs[: 0 if rank else 4])
    (outputs.square().sum() + regularizer()).backward()
    return [parameter.grad for parameter in entry.model.parameters()]


def no_losses(rank: int, strength: float) -> dict[str, Tensor]:
    quiet()
    inner = ReturnsFeature().double()
    inner.load_state_dict(build_model().state_dict())
    model = DistributedDataParallel(inner, find_unused_parameters=True)
    regularizer = SaliencyRegularizer(model, "heads", strength=strength, surgery=PCGrad(), metric="l1")
    mine = share(rank)
    outputs, feature = model(mine.inputs)
    losses = {} if rank else losses_of(outputs, mine.targets)
    (sum(losses.values()) + 0 * feature.sum() + regularizer()).backward()
    return {name: parameter.grad for name, parameter in inner.named_parameters()}


def no_heads_anywhere(rank: int) -> tuple[str, str]:
    model = build_model()
    regularizer = SaliencyRegularizer(model, "heads", strength=0.1, metric="l1")
    model(share(rank).inputs, ())
    return error_of(regularizer)


def nan_on_one(rank: int, what: str) -> tuple[Tensor, float, int]:
    quiet()
    inner = build_model().float()
    model = DistributedDataParallel(inner)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    regularizer = SaliencyRegularizer(model, "heads", strength=0.1, optimizer=optimizer, metric="l1")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    mine = share(rank)
    inputs, targets = mine.inputs.float(), mine.targets.float()
    if rank == 1 and what == "loss":
        targets = targets * torch.nan
    elif rank == 1:
        inputs = inputs * torch.nan
    losses = losses_of(model(inputs), targets)
    scaler.scale(sum(losses.values()) + regularizer(losses=losses)).backward()
    scaler.step(optimizer)
    scaler.update()
    return regularizer.relations.matrix(), float(regularizer.report.losses), int(regularizer.steps)


def not_finite_on_one(rank: int) -> tuple[str, str]:
    model = build_model()
    regularizer = SaliencyRegularizer(model, "heads", strength=0.1, check_finite=True, metric="l1")
    mine = share(rank)
    model(mine.inputs * (torch.nan if rank else 1))
    return error_of(regularizer)


def sampled(rank: int) -> tuple[list[tuple[str, ...]], Tensor]:
    model = build_model()
    regularizer = SaliencyRegularizer(model, "heads", strength=0.1, max_tasks_per_step=2, metric="l1")
    found = []
    for _ in range(6):
        model(share(rank).inputs, TASKS[:2] if rank else TASKS)
        regularizer()
        found.append(regularizer.report.present)
        regularizer.step()
    return found, regularizer.relations.matrix()


def outputs_by_hand(rank: int, option: str, target: str) -> tuple[str, str, dict[str, Tensor | None]]:
    quiet()
    inner = build_model()
    options = {} if option == "plain" else {option: True}
    model = DistributedDataParallel(inner, **options)
    caught: list[Tensor] = []
    inner.backbone.register_forward_hook(lambda module, args, output: caught.append(output))
    regularizer = SaliencyRegularizer(
        model if target == "loss" else None,
        "heads" if target == "loss" else None,
        tasks=None if target == "loss" else TASKS,
        target=target,
        strength=STRENGTH,
        metric="l1",
    )
    mine = share(rank)

    def step() -> None:
        outputs = model(mine.inputs)
        losses = losses_of(outputs, mine.targets)
        if target == "loss":
            penalty = regularizer(losses=losses)
        else:
            penalty = regularizer(outputs=outputs, features=caught[0])
        (sum(losses.values()) + penalty).backward()

    return *error_of(step), {name: parameter.grad for name, parameter in inner.named_parameters()}


class TestOutputsOfTheWrappedModel:
    @pytest.mark.parametrize("option", ["plain", "find_unused_parameters"])
    def test_given_by_hand(self, option: str) -> None:
        model = build_model()
        expected = slow_joined_step(
            model, TASKS, [share(0), share(1)], losses_of, RelationWeights(3).matrix(), STRENGTH
        )
        for kind, text, gradients in run_on_two_processes(outputs_by_hand, option, "output"):
            assert kind == "no error", text
            for name, wanted in expected.gradients.items():
                torch.testing.assert_close(gradients[name], wanted, rtol=1e-10, atol=1e-10, msg=name)

    @pytest.mark.parametrize("target", ["output", "loss"])
    def test_static_graph_is_refused(self, target: str) -> None:
        for kind, text, _ in run_on_two_processes(outputs_by_hand, "static_graph", target):
            assert kind == "ConfigurationError"
            assert "static_graph=False" in text

    def test_saliency_of_losses(self) -> None:
        """The mean over the processes of each one's part is what one process has with both samples."""
        model = build_model()
        regularizer = SaliencyRegularizer(model, "heads", target="loss", strength=STRENGTH, metric="l1")
        both = [share(0), share(1)]
        inputs, targets = (torch.cat([getattr(one, name) for one in both]) for name in ("inputs", "targets"))
        losses = losses_of(model(inputs), targets)
        (sum(losses.values()) + regularizer(losses=losses)).backward()
        for kind, text, gradients in run_on_two_processes(outputs_by_hand, "find_unused_parameters", "loss"):
            assert kind == "no error", text
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-10, atol=1e-10, msg=name)


def surgery_on_parameters(rank: int) -> dict[str, Tensor]:
    model = build_model()
    surgery = ParameterSurgery(model, PCGrad(), tasks=TASKS, shared="backbone")
    regularizer = SaliencyRegularizer(model, "heads", strength=STRENGTH, metric="l1")
    mine = share(rank, size=5 - 3 * rank)
    losses = losses_of(model(mine.inputs), mine.targets)
    surgery.backward(losses, regularizer())
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_surgery_on_parameters_adds_the_joined_penalty() -> None:
    model = build_model()
    shares = [share(0, size=5), share(1, size=2)]
    weights = RelationWeights(3).matrix()
    plain = slow_joined_step(model, TASKS, shares, losses_of, weights, 0.0).gradients
    with_penalty = slow_joined_step(model, TASKS, shares, losses_of, weights, STRENGTH).gradients
    backbone = [name for name in plain if name.startswith("backbone")]
    by_task = []
    for task in TASKS:
        only = slow_joined_step(
            model,
            TASKS,
            shares,
            lambda outputs, targets, task=task: {task: losses_of(outputs, targets)[task]},
            weights,
            0.0,
        )
        by_task.append(torch.cat([only.gradients[name].flatten() for name in backbone]))
    combined = textbook_pcgrad(by_task, PCGrad().order(3, 0))
    first, second = run_on_two_processes(surgery_on_parameters)
    offset = 0
    for name, ours in first.items():
        assert torch.equal(ours, second[name])
        wanted = with_penalty[name]
        if name in backbone:
            wanted = wanted - plain[name] + combined[offset : offset + ours.numel()].view_as(ours)
            offset += ours.numel()
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10, msg=name)
