"""Attached to trainings that combine task gradients in another way: right values, or an error that says what to do."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import FeatureSurgery, PCGrad, RelationWeights, SaliencyRegularizer
from saliency_reg.errors import SurgeryError
from tests.reference.slow_fork import slow_step
from tests.reference.slow_surgery import textbook_pcgrad


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 6), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class EncoderAndDecoders(nn.Module):
    """The shape of a LibMTL model: one encoder, a dictionary of decoders, a dictionary of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.task_name = ["first", "second", "third"]
        self.encoder = Encoder()
        self.decoders = nn.ModuleDict(
            {task: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)) for task in self.task_name}
        )

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        feature = self.encoder(inputs)
        return {task: self.decoders[task](feature) for task in self.task_name}

    def get_share_params(self):
        return self.encoder.parameters()

    # For the slow reference.
    def feature_map(self, inputs: Tensor) -> Tensor:
        return self.encoder(inputs)

    def from_feature(self, feature: Tensor) -> dict[str, Tensor]:
        return {task: self.decoders[task](feature) for task in self.task_name}


def make() -> tuple[EncoderAndDecoders, Tensor]:
    torch.manual_seed(1)
    return EncoderAndDecoders().double(), torch.randn(6, 5, dtype=torch.float64)


def losses_of(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        task: (output - torch.randn(output.shape, generator=generator, dtype=torch.float64)).square().mean()
        for task, output in outputs.items()
    }


def no_loss(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"first": 0 * outputs["first"].sum()}


def attach(model: nn.Module, **options: object) -> SaliencyRegularizer:
    return SaliencyRegularizer(
        model, strength=0.7, relations=RelationWeights(3, "fixed"), **{"metric": "l1", **options}
    )


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-10, msg=name)


# LibMTL: the heads are found, the weighted sum of losses is one backward pass.


@pytest.mark.parametrize("surgery", [False, True])
def test_encoder_and_decoders_with_equal_weighting(surgery: bool) -> None:
    model, inputs = make()
    combine = (lambda g: textbook_pcgrad(g, PCGrad().order(3, 0))) if surgery else sum
    expected = slow_step(model, inputs, losses_of, combine, 0.7)
    regularizer = attach(model, surgery=PCGrad() if surgery else None)
    assert regularizer.tasks == ("first", "second", "third")
    losses = torch.stack(list(losses_of(model(inputs)).values()))
    loss = torch.mul(losses, torch.ones_like(losses)).sum()
    (loss + regularizer()).backward()
    close(gradients(model), expected.gradients)


def test_one_backward_per_task_is_refused_under_surgery() -> None:
    """As LibMTL's gradient methods do without ``rep_grad``."""
    model, inputs = make()
    FeatureSurgery(model)
    losses = list(losses_of(model(inputs)).values())
    losses[0].backward(retain_graph=True)
    with pytest.raises(SurgeryError, match="leave surgery= out"):
        losses[1].backward(retain_graph=True)


# A loop with an optimizer that wraps another one, as many ports of PCGrad have it.


class WrappedOptimizer:
    """Textbook PCGrad over all parameters, one backward pass per loss."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def pc_backward(self, losses: Sequence[Tensor]) -> None:
        flat = []
        for loss in losses:
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward(retain_graph=True)
            flat.append(
                torch.cat(
                    [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in self.parameters]
                )
            )
        combined = textbook_pcgrad(flat, PCGrad().order(len(flat), 0))
        for parameter, part in zip(self.parameters, combined.split([p.numel() for p in self.parameters])):
            parameter.grad = part.view_as(parameter).clone()

    def step(self) -> None:
        self.optimizer.step()


def test_beside_an_optimizer_that_wraps_another_one() -> None:
    model, inputs = make()
    plain = copy.deepcopy(model)
    wrapped = WrappedOptimizer(torch.optim.SGD(plain.parameters(), lr=0.1))
    wrapped.pc_backward(list(losses_of(plain(inputs)).values()))
    penalty = slow_step(plain, inputs, no_loss, sum, 0.7).gradients
    expected = {
        name: value + (0 if penalty[name] is None else penalty[name]) for name, value in gradients(plain).items()
    }

    optimizer = WrappedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    regularizer = attach(model, optimizer=optimizer)
    losses = losses_of(model(inputs))
    term = regularizer()
    optimizer.pc_backward(list(losses.values()))
    term.backward()  # adds to the gradients
    close(gradients(model), expected)
    optimizer.step()
    assert int(regularizer.steps) == 1  # the wrapped optimizer was found


def test_under_surgery_a_wrapping_optimizer_is_refused() -> None:
    model, inputs = make()
    regularizer = attach(model, surgery=PCGrad())
    losses = losses_of(model(inputs))
    regularizer()
    with pytest.raises(SurgeryError, match=r"optimizer\.zero_grad\(\)"):
        WrappedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1)).pc_backward(list(losses.values()))


# TorchJD.


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_beside_mtl_backward_of_torchjd(chunk_size: int | None) -> None:
    autojac = pytest.importorskip("torchjd.autojac")
    aggregation = pytest.importorskip("torchjd.aggregation")

    def step(model: nn.Module, regularizer: SaliencyRegularizer | None) -> dict[str, Tensor]:
        feature = model.encoder(inputs)
        outputs = {task: model.decoders[task](feature) for task in model.task_name}
        losses = losses_of(outputs)
        if regularizer is not None:
            regularizer().backward(retain_graph=True)
        autojac.mtl_backward(list(losses.values()), features=feature, parallel_chunk_size=chunk_size)
        autojac.jac_to_grad(list(model.encoder.parameters()), aggregation.MGDA())
        return gradients(model)

    model, inputs = make()
    alone = step(copy.deepcopy(model), None)
    penalty = slow_step(model, inputs, no_loss, sum, 0.7).gradients
    both = step(model, attach(model))
    close(both, {name: value + (0 if penalty[name] is None else penalty[name]) for name, value in alone.items()})


def test_under_surgery_mtl_backward_is_refused() -> None:
    autojac = pytest.importorskip("torchjd.autojac")
    model, inputs = make()
    FeatureSurgery(model)
    feature = model.encoder(inputs)
    losses = losses_of({task: model.decoders[task](feature) for task in model.task_name})
    with pytest.raises(SurgeryError, match="TorchJD"):
        autojac.mtl_backward(list(losses.values()), features=feature)
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
