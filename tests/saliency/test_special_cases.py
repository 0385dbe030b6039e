"""Cases in which the penalty is known in closed form (DESIGN of the method, exact special cases)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import RelationWeights, SaliencyRegularizer, task_distances, task_saliencies
from saliency_reg.saliency.distances import METRICS
from tests.support.zoo import TASKS, VectorHeads, build, mlp


def uniform(tasks: int) -> RelationWeights:
    return RelationWeights(tasks, "fixed", mass=1.0)


def test_linear_heads_give_graph_regularised_and_mean_regularised_learning() -> None:
    """With uniform weights: sum_t |theta_t - mean|^2 = (1/T) sum_{i<j} |theta_i - theta_j|^2."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"heads": nn.ModuleList([nn.Linear(7, 1) for _ in range(5)])}).double()
    pairs = 10
    regularizer = SaliencyRegularizer(
        model, "heads", metric="sqeuclidean", strength=pairs / 5, relations=RelationWeights(5, "fixed")
    )
    x = torch.randn(4, 7, dtype=torch.float64)
    for head in model["heads"]:
        head(x)
    theta = torch.cat([head.weight for head in model["heads"]])
    expected = ((theta - theta.mean(0)) ** 2).sum()
    penalty = regularizer()
    torch.testing.assert_close(penalty, expected, rtol=1e-12, atol=0)
    ours = torch.autograd.grad(penalty, list(model.parameters()), allow_unused=True)
    theirs = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    for a, b in zip(ours, theirs):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_linear_head_has_its_weight_row_as_saliency() -> None:
    head = nn.Linear(6, 4).double()
    feature = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    saliencies = task_saliencies(head(feature).unbind(1), feature)
    assert torch.equal(saliencies, head.weight.unsqueeze(1).expand(4, 3, 6))


@pytest.mark.parametrize("pool", ["sum", "mean", None])
@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("tokens", [True, False])
def test_closed_form_equals_autograd(columns: bool, tokens: bool, pool: str | None) -> None:
    torch.manual_seed(0)
    head: nn.Module = nn.Linear(6, 3) if columns else nn.ModuleDict({task: nn.Linear(6, 1) for task in TASKS})
    model = nn.ModuleDict({"head": head}).double()
    feature = torch.randn(*((4, 5, 6) if tokens else (4, 6)), dtype=torch.float64, requires_grad=True)
    mask = torch.rand(4, 5) > 0.4 if tokens else None
    for reduction in ("mean", "sum"):
        options = {"pool": pool, "reduction": reduction, "strength": 1.0, "relations": uniform(3)}
        regularizer = SaliencyRegularizer(model, "head", tasks=TASKS, **{"strength": 0.1, "metric": "l1", **options})
        with regularizer:
            if columns:
                outputs = list(head(feature).split(1, dim=-1))
            else:
                outputs = [one(feature) for one in head.values()]
            ours = regularizer(mask=mask)
            assert "closed form" in regularizer.describe()
        theirs = SaliencyRegularizer(None, tasks=TASKS, **{"strength": 0.1, "metric": "l1", **options})(
            outputs=outputs, features=feature, mask=mask
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
        for a, b in zip(torch.autograd.grad(ours, head.parameters(), allow_unused=True),
                        torch.autograd.grad(theirs, head.parameters(), allow_unused=True)):  # fmt: skip
            if a is not None or b is not None:
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_behind_dropout_it_is_the_masked_row() -> None:
    torch.manual_seed(0)
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 2))
    feature = torch.ones(50, 6, requires_grad=True)
    dropped = head[0](feature)
    saliencies = task_saliencies(head[1](dropped).unbind(1), feature)
    torch.testing.assert_close(saliencies, dropped.detach() * head[1].weight.unsqueeze(1))


@pytest.mark.parametrize("size", [2, 7])
def test_behind_average_pooling_the_sum_is_the_row_at_any_resolution(size: int) -> None:
    weight = torch.randn(3, 4, dtype=torch.float64)
    feature = torch.randn(2, 4, size, size, dtype=torch.float64, requires_grad=True)
    outputs = (feature.mean((2, 3)) @ weight.T).unbind(1)
    torch.testing.assert_close(task_saliencies(outputs, feature)[:, 0], weight)
    torch.testing.assert_close(task_saliencies(outputs, feature, pool="mean")[:, 0], weight / size**2)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("pool", ["sum", None])
def test_heads_equal_up_to_a_constant_have_no_penalty(metric: str, pool: str | None) -> None:
    torch.manual_seed(0)
    model = VectorHeads(lambda: mlp(nn.Tanh())).double()
    first = model.heads["first"]
    for task in TASKS[1:]:
        model.heads[task].load_state_dict(first.state_dict())
        with torch.no_grad():
            model.heads[task][2].bias += 5.0
    regularizer = SaliencyRegularizer(model, "heads", metric=metric, pool=pool, strength=1.0)
    model(torch.randn(4, 5, dtype=torch.float64))
    assert float(regularizer().detach()) < 1e-14


@pytest.mark.parametrize("metric", ["l1", "l2", "sqeuclidean"])
def test_the_converse_holds_without_pooling(metric: str) -> None:
    """No penalty means equal gradients at every sample seen: heads that differ have one."""
    entry = build("tanh heads")
    regularizer = SaliencyRegularizer(
        entry.model, "heads", metric=metric, pool=None, relations=uniform(3), strength=0.1
    )
    entry.model(entry.inputs)
    assert float(regularizer().detach()) > 1e-3


@pytest.mark.parametrize("scalarize", ["auto", "label_log_probability"])
def test_a_function_added_to_all_logits_changes_nothing(scalarize: str) -> None:
    torch.manual_seed(0)
    feature = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    logits = [feature @ torch.randn(4, 3, dtype=torch.float64) for _ in range(2)]
    shift = (feature**2).sum(1, keepdim=True)
    targets = [torch.randint(3, (5,)) for _ in range(2)]
    plain = task_saliencies(logits, feature, scalarize=scalarize, targets=targets)
    shifted = task_saliencies([z + shift for z in logits], feature, scalarize=scalarize, targets=targets)
    torch.testing.assert_close(plain, shifted, rtol=1e-12, atol=1e-13)


def test_whole_networks_on_the_input_are_soft_sharing() -> None:
    """The model's own input as the feature map."""
    torch.manual_seed(0)
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    networks = [nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)).double() for _ in range(3)]
    saliencies = task_saliencies([network(x) for network in networks], x)
    distances = task_distances(saliencies, metric="l2")
    penalty = SaliencyRegularizer(None, tasks=TASKS, metric="l2", strength=2.0, relations=uniform(3))(
        outputs={task: network(x) for task, network in zip(TASKS, networks)}, features=x
    )
    torch.testing.assert_close(penalty, 2.0 * distances.triu(1).sum() / 3)


@pytest.mark.parametrize("name", ["relu heads", "linear heads", "pooled columns"])
def test_piecewise_linear_heads_do_not_pass_the_penalty_to_the_backbone(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    entry = build(name)
    options = {"heads": "heads", **entry.options}
    regularizer = SaliencyRegularizer(entry.model, **{"metric": "l1", **options}, strength=1.0)
    for _ in range(3):
        entry.model(entry.inputs)
        regularizer().backward()
    for parameter in entry.model.backbone.parameters():
        assert parameter.grad is None or not parameter.grad.any()
    assert "reaches the backbone  no" in regularizer.describe()
    assert len([record for record in caplog.records if "does not reach the backbone" in record.message]) == 1


def test_without_a_penalty_nothing_is_said_of_its_reach(caplog: pytest.LogCaptureFixture) -> None:
    entry = build("linear heads")
    SaliencyRegularizer(entry.model, heads="heads", **entry.options, strength=0.0)
    assert not caplog.records


@pytest.mark.parametrize("name", ["tanh heads", "pooling heads", "trunk"])
def test_smooth_heads_do(name: str, caplog: pytest.LogCaptureFixture) -> None:
    entry = build(name)
    options = {"heads": "heads", **entry.options}
    regularizer = SaliencyRegularizer(entry.model, **{"metric": "l1", **options}, strength=1.0)
    entry.model(entry.inputs)
    regularizer().backward()
    assert any(p.grad is not None and p.grad.any() for p in entry.model.parameters())
    assert "reaches the backbone  yes" in regularizer.describe()
    assert not caplog.records


def test_loss_target_reaches_the_backbone_behind_linear_heads() -> None:
    entry = build("linear heads")
    regularizer = SaliencyRegularizer(entry.model, "heads", target="loss", strength=1.0, metric="l1")
    outputs = entry.model(entry.inputs)
    regularizer(losses={task: output.square().mean() for task, output in outputs.items()}).backward()
    assert entry.model.backbone[0].weight.grad.any()


def test_accumulated_batches_equal_one_batch() -> None:
    """With mean reduction, micro-batches weighted by their size give the gradient of the whole batch."""
    entry = build("tanh heads")
    x = torch.randn(9, 5, dtype=torch.float64)
    whole, parts = copy.deepcopy(entry.model), copy.deepcopy(entry.model)
    for model, batches in ((whole, [x]), (parts, [x[:2], x[2:]])):
        regularizer = SaliencyRegularizer(model, "heads", strength=1.0, relations=uniform(3), metric="l1")
        for batch in batches:
            model(batch)
            (regularizer() * len(batch) / len(x)).backward()
    for (name, a), (_, b) in zip(whole.named_parameters(), parts.named_parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-14, msg=name)


def test_authors_conventions() -> None:
    """Sums over positions and batch, l1, uniform start: the published penalty on the first step."""
    entry = build("pooling heads")
    regularizer = SaliencyRegularizer.authors(entry.model, "heads", strength=0.1)
    outputs = entry.model(entry.inputs)
    penalty = regularizer()
    feature = entry.model.feature_map(entry.inputs)
    alphas: list[Tensor] = []
    outputs = entry.model.from_feature(feature)
    for task in TASKS:
        (gradient,) = torch.autograd.grad(outputs[task].sum(), feature, retain_graph=True)
        alphas.append(gradient.sum((2, 3)))
    total = sum((alphas[i] - alphas[j]).abs().sum() for i in range(3) for j in range(i + 1, 3))
    torch.testing.assert_close(penalty.detach(), 0.1 * total / 3)
    assert regularizer.relations.rule == "authors"


def test_it_can_be_built_on_the_meta_device() -> None:
    """A large model is often built there, and everything around it in the same block."""
    with torch.device("meta"):
        regularizer = SaliencyRegularizer(mlp(nn.Tanh(), 3), "2", strength=0.5, warmup_steps=10, metric="l1")
    assert regularizer.current_strength == 0.05
