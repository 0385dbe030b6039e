"""``run_all_heads``: heads that did not run are run, on the tensor that the others read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import SaliencyRegularizer, errors
from tests.saliency.support import Behind, last, mlp, tokens, told

pytestmark = pytest.mark.usefixtures("float64")


class Batches(nn.Module):
    """Each batch is of one task, whose head reads what ``kinds`` makes of the map."""

    def __init__(self, kinds: dict[str, Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.stage, self.kinds = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Tanh()), kinds
        self.heads = nn.ModuleDict({task: Behind(mlp(6, 1), lambda z: z.flatten(1).mean(1)) for task in kinds})

    def forward(self, x: Tensor, task: str) -> Tensor:
        return self.heads[task](self.kinds[task](self.stage(x)))


def vector(z: Tensor) -> Tensor:
    return z.mean((2, 3))


@pytest.mark.parametrize("other", [tokens, last])
def test_heads_are_not_run_on_another_kind_of_tensor(other: Callable[[Tensor], Tensor]) -> None:
    net = Batches({"a": vector, "b": vector, "odd": other})
    regularizer = SaliencyRegularizer(
        net, heads="heads", strength=1.0, run_all_heads=True, channel_axis=-1, metric="l1"
    )
    x = torch.randn(3, 1, 5, 5)
    found = {}

    def train() -> None:
        for task in ("a", "b", "odd", "a", "odd", "b"):
            net(x, task)
            regularizer()
            found[task] = regularizer.report.distances

    messages = told(train)
    assert len(messages) == 1
    assert "'heads.a' (2 axes)" in messages[0]
    assert "'heads.odd'" in messages[0]
    torch.testing.assert_close(found["a"][0, 1], found["b"][0, 1])
    assert found["a"][0, 1] > 0
    assert found["a"][0, 2].isnan()
    assert found["odd"].isnan().sum() == 8


def test_a_head_that_cannot_run_on_it() -> None:
    net = Batches({"a": vector, "wide": lambda z: z.flatten(1)})
    net.heads["wide"] = mlp(54, 1)
    regularizer = SaliencyRegularizer(net, heads="heads", strength=1.0, run_all_heads=True, metric="l1")
    net(torch.randn(3, 1, 5, 5), "a")
    with pytest.raises(
        errors.CaptureError, match=r"cannot run head 'heads.wide' on what head 'heads.a' was called with"
    ):
        regularizer()


LAYERS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


class Tagger(nn.Module):
    def __init__(self, kind: str, behind: str, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.behind = LAYERS[kind](3, 4, **options), behind
        self.heads = nn.ModuleDict({task: nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 1)) for task in "ab"})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        states = self.layer(x)[0]
        if self.behind == "dropout":
            states = nn.functional.dropout(states, 0.5).relu()
        if self.behind == "transpose":
            states = states.transpose(0, 1)
        return {task: head(states) for task, head in self.heads.items()}


@pytest.mark.parametrize("behind", ["", "dropout"])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_sequence_of_a_recurrent_layer_is_not_taken_for_samples(kind: str, behind: str) -> None:
    model, x = Tagger(kind, behind).double(), torch.randn(7, 5, 3).double()
    regularizer = SaliencyRegularizer(model, heads="heads", strength=0.1, metric="l1")
    model(x)
    with pytest.raises(errors.ShapeError, match=r"\[7, 5, 4\] comes out of a recurrent layer.*Pass batch_axis=1"):
        regularizer()
    regularizer.remove()
    if behind:
        return
    found = []
    for other, given, axis in ((Tagger(kind, "", batch_first=True), x.transpose(0, 1), 0), (model, x, 1)):
        twin = other.double()
        twin.load_state_dict(model.state_dict())
        with SaliencyRegularizer(
            twin, heads="heads", batch_axis=axis, relations="fixed", strength=0.1, metric="l1"
        ) as right:
            twin(given)
            found.append(right())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_recurrent_layer_whose_output_was_transposed_has_its_samples_first(kind: str) -> None:
    model = Tagger(kind, "transpose")
    regularizer = SaliencyRegularizer(model, heads="heads", strength=0.1, metric="l1")
    model(torch.randn(7, 5, 3))
    assert regularizer() > 0
