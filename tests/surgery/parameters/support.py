"""A net with four tasks, its losses, and the textbook loop."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saliency_reg import PCGrad
from tests.reference.slow_surgery import conflicting_pairs, flat_gradient, split_like, textbook_pcgrad

TASKS = ("a", "b", "c", "d")

SAMPLES = 24


class Net(nn.Module):
    """Four tasks on a backbone of two layers; one parameter that nothing uses."""

    def __init__(self, tasks: tuple[str, ...] = TASKS) -> None:
        super().__init__()
        self.lower = nn.Linear(6, 8)
        self.upper = nn.Linear(8, 8)
        self.heads = nn.ModuleDict({task: nn.Linear(8, 1) for task in tasks})
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        feature = torch.tanh(self.upper(torch.tanh(self.lower(x))))
        return {task: head(feature) for task, head in self.heads.items()}


def make(seed: int = 0, tasks: tuple[str, ...] = TASKS) -> Net:
    torch.manual_seed(seed)
    return Net(tasks)


def data(step: int = 0, tasks: tuple[str, ...] = TASKS) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(SAMPLES, 6, generator=generator)
    return x, {task: 3 * torch.randn(SAMPLES, 1, generator=generator) for task in tasks}


def losses_of(model: nn.Module, step: int = 0, part: slice = slice(None), factor: float = 1.0) -> dict[str, Tensor]:
    tasks = tuple(model.heads)
    x, targets = data(step, tasks)
    outputs = model(x[part])
    return {task: factor * (outputs[task] - targets[task][part]).square().mean() for task in tasks}


def penalty_of(model: Net) -> Tensor:
    """Reaches the backbone, the heads, and the parameter that no loss reaches."""
    return torch.stack([parameter.pow(3).sum() for parameter in model.parameters()]).sum()


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def expected(
    model: Net, losses: dict[str, Tensor], order: Tensor, penalty: Tensor | None = None, measure: str = "er."
) -> dict[str, Tensor | None]:
    """Textbook gradients, with the weights found on the parameters whose names hold ``measure``."""
    shared = {name: p for name, p in model.named_parameters() if name.startswith(("lower", "upper"))}
    rows = [flat_gradient(loss, list(shared.values())) for loss in losses.values()]
    chosen = torch.cat([torch.full((p.numel(),), measure in name) for name, p in shared.items()])
    assert conflicting_pairs([row[chosen] for row in rows]) > 0
    if bool(chosen.all()):
        combined = textbook_pcgrad(rows, order)
    else:
        # The textbook result lies in the span of the task gradients: its coordinates there are the weights.
        inside = torch.stack([row[chosen] for row in rows])
        result = textbook_pcgrad(list(inside), order)
        weights = torch.linalg.lstsq(inside.T, result.unsqueeze(1)).solution[:, 0]
        combined = (weights.unsqueeze(1) * torch.stack(rows)).sum(0)
    found: dict[str, Tensor | None] = dict(zip(shared, split_like(combined, list(shared.values()))))
    for name, parameter in model.named_parameters():
        if name not in shared:
            found[name] = torch.autograd.grad(sum(losses.values()), parameter, retain_graph=True, allow_unused=True)[0]
        if penalty is not None:
            (extra,) = torch.autograd.grad(penalty, parameter, retain_graph=True)
            found[name] = extra if found[name] is None else found[name] + extra
    return found


def assert_same(found: dict[str, Tensor | None], wanted: dict[str, Tensor | None], tolerance: float = 1e-10) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if value is None:
            assert found[name] is None, name
        else:
            assert found[name] is not None, name
            torch.testing.assert_close(
                found[name], value, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
            )


def order_of(call: int = 0, tasks: int = len(TASKS)) -> Tensor:
    return PCGrad().order(tasks, call)
