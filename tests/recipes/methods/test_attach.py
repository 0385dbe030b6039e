"""What is attached to one linear layer with a column for each task is what is attached to a module for each."""

import pytest
import torch
from torch import nn

from recipes.methods.attach import attach
from recipes.methods.methods import METHODS, Method, package_defaults
from recipes.runtime.errors import OptionError

TASKS = ("a", "b", "c")


class _Modules(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(5, 4), nn.GELU())
        self.heads = nn.ModuleDict({task: nn.Linear(4, 1) for task in TASKS})

    def forward(self, inputs):
        feature = self.backbone(inputs)
        return [head(feature).squeeze(1) for head in self.heads.values()]


class _Columns(nn.Module):
    def __init__(self, other):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(5, 4), nn.GELU())
        self.heads = nn.Linear(4, 3)
        self.double().backbone.load_state_dict(other.backbone.state_dict())
        with torch.no_grad():
            self.heads.weight.copy_(torch.cat([head.weight for head in other.heads.values()]))
            self.heads.bias.copy_(torch.cat([head.bias for head in other.heads.values()]))

    def forward(self, inputs):
        return self.heads(self.backbone(inputs)).unbind(1)


@pytest.mark.parametrize("way", ["strength", "share"])
@pytest.mark.parametrize(
    "key", ["srdml", "srdml_cosine", "srdml_uniform_cosine", "srdml_cosine+pcgrad", "srdml_cosine+pcgrad@parameters"]
)
def test_columns_equal_modules(key, way):
    torch.manual_seed(0)
    modules = _Modules().double()
    columns = _Columns(modules)
    left = []
    for model in (modules, columns):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        share = 0.5 if way == "share" else None
        backward = attach(METHODS[key], model, TASKS, optimizer, strength=0.5, share=share, batch_size=8, seed=0)
        generator = torch.Generator().manual_seed(1)
        for _ in range(25):
            inputs = torch.randn(8, 5, generator=generator, dtype=torch.float64)
            targets = torch.randn(3, 8, generator=generator, dtype=torch.float64)
            losses = [(output - target).square().mean() for output, target in zip(model(inputs), targets)]
            optimizer.zero_grad()
            backward(losses, arguments={"losses": torch.stack(losses).detach().sum()})
            optimizer.step()
        assert backward.regularizer.report.penalty > 0
        left.append((model.backbone[0].weight.detach(), torch.tensor(backward.relations)))
    for one, other in zip(*left):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


class TestOptionsOfTheSaliency:
    @pytest.mark.parametrize("tuned", [True, False])
    def test_reach_the_regularizer(self, tuned):
        own = {"rule": "entropic", "metric": "cosine"} if tuned else package_defaults()
        method = Method("loss", "Loss saliency", **own, saliency={"target": "loss", "pool": None})
        model = _Modules().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        backward = attach(
            method, model, TASKS, optimizer, strength=0.5, share=0.5 if tuned else "its own", batch_size=8, seed=0
        )
        assert backward.regularizer.target == "loss"
        assert "pool=None" in backward.regularizer.describe()

    def test_rule_of_the_authors_with_another_metric_is_their_rule_alone(self):
        for metric, reduction in (("l1", "sum"), ("cosine", "mean")):
            method = Method("authors", "Authors", rule="authors", metric=metric)
            model = _Modules()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            found = attach(method, model, TASKS, optimizer, strength=0.5, batch_size=8, seed=0).regularizer
            assert (found.relations.rule, found.metric, found.reduction) == ("authors", metric, reduction)

    def test_without_a_penalty_are_refused(self):
        with pytest.raises(OptionError, match="no penalty"):
            Method("plain", "Plain", saliency={"pool": "mean"})
