"""Activation checkpointing and compiled parts: the same values as without them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from saliency_reg import PCGrad, SaliencyRegError, SaliencyRegularizer
from saliency_reg.errors import CaptureError, ConfigurationError
from tests.support.training import TASKS, Net, batch


class Checkpointed(Net):
    """Net without dropout and BatchNorm, so that a recomputation can be compared."""

    def __init__(self, where: str = "", reentrant: bool = False) -> None:
        super().__init__()
        self.where, self.reentrant = where, reentrant
        self.eval()

    def run(self, part: str, module: nn.Module, x: Tensor) -> Tensor:
        if self.where != part:
            return module(x)
        return checkpoint(module, x, use_reentrant=self.reentrant)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        feature = self.run("backbone", self.backbone, x)
        return {task: self.run("heads", head, feature) for task, head in self.heads.items()}


def step(model: nn.Module, frozen: bool = False, **options: object) -> tuple[Tensor, dict[str, Tensor]]:
    if frozen:
        model.backbone.requires_grad_(False)
    x = batch(0)[0].requires_grad_()
    with SaliencyRegularizer(model, "heads", strength=1.0, **{"metric": "l1", **options}) as regularizer:
        outputs = model(x)
        penalty = regularizer()
        (sum(output.square().mean() for output in outputs.values()) + penalty).backward()
    return penalty.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, gradient in found[1].items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=1e-6, atol=1e-8, msg=name)


def build(where: str = "", reentrant: bool = False) -> Checkpointed:
    torch.manual_seed(0)
    return Checkpointed(where, reentrant)


@pytest.mark.parametrize(
    ("where", "reentrant", "frozen"),
    [
        ("backbone", False, False),
        ("backbone", True, False),
        ("heads", False, False),
        ("backbone", False, True),
        ("heads", False, True),
    ],
)
def test_checkpointing(where: str, reentrant: bool, frozen: bool) -> None:
    assert_same(step(build(where, reentrant), frozen), step(build(), frozen))


def test_a_feature_inside_a_checkpoint() -> None:
    expected = step(build(), feature="backbone.0")
    assert_same(step(build("backbone"), feature="backbone.0"), expected)
    with pytest.raises(CaptureError, match="use_reentrant=False is needed"):
        step(build("backbone", reentrant=True), feature="backbone.0")


def test_reentrant_checkpoints_of_heads_are_refused() -> None:
    with pytest.raises(CaptureError, match="pass use_reentrant=False"):
        step(build("heads", reentrant=True))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_backbone(backend: str) -> None:
    torch._dynamo.reset()
    model = build()
    model.backbone = torch.compile(model.backbone, backend=backend)
    penalty, gradients = step(model)
    expected_penalty, expected = step(build())
    torch.testing.assert_close(penalty, expected_penalty)
    gradients = {name.replace("_orig_mod.", ""): gradient for name, gradient in gradients.items()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("way", ["whole", "in place", "head", "inside a head"])
def test_compiled_heads_are_refused(way: str) -> None:
    model: nn.Module = build()
    if way == "whole":
        model = torch.compile(model)
    elif way == "in place":
        model.compile()
    elif way == "head":
        model.heads["left"] = torch.compile(model.heads["left"])
    else:
        model.heads["left"].hidden = torch.compile(model.heads["left"].hidden)
    with pytest.raises(ConfigurationError, match=r"compiled by torch.compile.*model.backbone.compile\(\)"):
        SaliencyRegularizer(model, "heads", strength=0.1, metric="l1")


@pytest.mark.filterwarnings("ignore")  # of the compiler, which looks at tensors that are no leaves
@pytest.mark.parametrize("surgery", [False, True])
def test_a_model_compiled_as_a_whole_after_attaching_is_refused(surgery: bool) -> None:
    """The compiler has seen the heads then, which are differentiated twice."""
    torch._dynamo.reset()
    model = build()
    regularizer = SaliencyRegularizer(model, "heads", surgery=PCGrad() if surgery else None, strength=0.1, metric="l1")
    compiled = torch.compile(model, backend="aot_eager")
    compiled(batch(0)[0])
    with pytest.raises(SaliencyRegError, match=r"model.backbone.compile\(\)"):
        regularizer()


def test_tasks_are_those_of_the_training() -> None:
    assert SaliencyRegularizer(build(), "heads", strength=0.1, metric="l1").tasks == TASKS
