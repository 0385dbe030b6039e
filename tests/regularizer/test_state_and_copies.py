"""What outlives a step: copies, averages, other devices, refused states, weightings with state, changing sets of tasks."""

from __future__ import annotations

import copy
import copyreg
import gc
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from saliency_reg import FeatureSurgery, ParameterSurgery, PCGrad, RelationWeights, SaliencyRegularizer, task_distances
from saliency_reg.distributed import Ranks
from saliency_reg.errors import CaptureError, ConfigurationError, SaliencyRegError, StateMismatchError
from saliency_reg.surgery import task_weights
from tests.reference.slow import slow_distances

TASKS = "abc"


class Net(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Sequential(nn.Linear(8, 4), nn.GELU(), nn.Linear(4, 1)) for task in TASKS})
        if options:
            self.regularizer = SaliencyRegularizer(self, heads="heads", **{"strength": 0.1, "metric": "l1", **options})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        feature = self.backbone(x)
        return {task: head(feature) for task, head in self.heads.items()}


def trained(net: Net, steps: int, each: Callable[[], Any] = lambda: None) -> Net:
    for step in range(steps):
        net(torch.randn(4, 6, generator=torch.Generator().manual_seed(step)))
        net.regularizer()
        net.regularizer.step()
        each()
    return net


# Copies.


def member_by_member(module: nn.Module) -> nn.Module:
    new = type(module).__new__(type(module))
    memo = {id(module): new}
    new.__dict__.update({name: copy.deepcopy(value, memo) for name, value in vars(module).items()})
    return new


def without_memo(module: nn.Module) -> nn.Module:
    new = type(module).__new__(type(module))
    new.__dict__.update(copy.deepcopy(vars(module)))
    return new


def shallow_members(module: nn.Module) -> nn.Module:
    new = type(module).__new__(type(module))
    new.__dict__.update(vars(module))
    new._modules = {name: copy.deepcopy(child) for name, child in module._modules.items()}
    return new


@pytest.mark.parametrize("how", [member_by_member, without_memo, shallow_members, copy.copy, copy.deepcopy])
@pytest.mark.parametrize("save", ["torch", "pickle", "deepcopy"])
def test_a_copy_is_saved_with_its_own_weights(how: Any, save: str) -> None:
    gc.collect()
    classes = {Net, nn.Linear, nn.Sequential}
    before = classes & copyreg.dispatch_table.keys()  # regularizers of other tests may be alive
    net = Net()
    regularizer = SaliencyRegularizer(net, heads="heads", strength=0.1, metric="l1")
    twin = how(net)
    if how is copy.copy:
        twin._modules = copy.deepcopy(net._modules)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.fill_(7.0)
    buffer = io.BytesIO()
    if save == "torch":
        torch.save(twin, buffer)
        buffer.seek(0)
        found = torch.load(buffer, weights_only=False)
    else:
        found = pickle.loads(pickle.dumps(twin)) if save == "pickle" else copy.deepcopy(twin)
    assert all(bool((parameter == 7).all()) for parameter in found.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in found.modules())
    assert not any(module._forward_pre_hooks_with_kwargs for module in found.modules())
    net(torch.randn(4, 6))
    assert regularizer() > 0
    regularizer.remove()
    assert classes & copyreg.dispatch_table.keys() <= before


# Averages.


def averages(kind: str) -> dict[str, Any]:
    if kind == "ema function":
        return {"avg_fn": lambda own, new, _: 0.9 * own + 0.1 * new}
    return {} if kind == "swa" else {"multi_avg_fn": get_ema_multi_avg_fn(float(kind))}


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        ("0.9", "entropic"),
        ("0.99", "projected"),
        ("0.999", "authors"),
        ("swa", "authors"),
        ("ema function", "entropic"),
    ],
)
def test_an_averaged_state_goes_on_at_full_strength(kind: str, rule: str) -> None:
    options = {"strength": 1.0, "start_step": 3, "warmup_steps": 20, "relations": rule, "seed": 12345}
    net = Net(**options)
    average = AveragedModel(net, use_buffers=True, **averages(kind))
    trained(net, 30, lambda: average.update_parameters(net))
    again = Net(**options)
    with pytest.warns(UserWarning, match="is an average"):
        again.load_state_dict(average.module.state_dict())
    regularizer = again.regularizer
    assert regularizer.current_strength == 1.0
    assert int(regularizer.steps) >= 23
    assert int(regularizer.relations.updates) == int(regularizer.steps)
    torch.testing.assert_close(regularizer.relations.matrix().triu(1).sum().item(), 1.0)
    assert torch.isfinite(trained(again, 2).regularizer.relations.matrix()).all()
    with pytest.warns(UserWarning, match="is an average"):
        assert average.module.regularizer.current_strength == 1.0  # the average itself


def test_a_copied_state_is_no_average() -> None:
    net = trained(Net(warmup_steps=20), 7)
    again = Net(warmup_steps=20)
    again.load_state_dict(
        {name: value for name, value in net.state_dict().items() if "as_float" not in name}, strict=False
    )
    assert int(again.regularizer.steps) == 7  # of an earlier version, too
    average = AveragedModel(net, use_buffers=True)
    average.update_parameters(net)
    assert average.module.regularizer.current_strength == net.regularizer.current_strength


@pytest.mark.parametrize("whole", [False, True], ids=["its own state", "within a model"])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("dtype", "steps"), [(torch.bfloat16, 1001), (torch.float16, 3001), (torch.float32, 1001)])
def test_a_state_of_fewer_digits_is_no_average(dtype: torch.dtype, steps: int, assign: bool, whole: bool) -> None:
    """The whole numbers tell the step; a warning would be an error here."""
    options = {"strength": 1.0, "start_step": 900, "warmup_steps": 4000}
    net = trained(Net(**options), 3)
    net.regularizer._set_steps(steps)
    source = net if whole else net.regularizer
    state = {n: value.to(dtype) if value.is_floating_point() else value for n, value in source.state_dict().items()}
    assert dtype is torch.float32 or int(state[("regularizer." if whole else "") + "steps_as_float"]) != steps
    again = Net(**options)
    (again if whole else again.regularizer).load_state_dict(state, assign=assign)
    again.float()
    regularizer = again.regularizer
    assert regularizer.current_strength == net.regularizer.current_strength == (steps - 899) / 4000
    for further in range(1, 4):
        trained(again, 1)
        assert int(regularizer.steps) == regularizer.steps_as_float == steps + further
        assert int(regularizer.relations.updates) == 3 + further
    assert regularizer.steps_as_float.dtype == torch.float64


def test_counts_that_were_made_smaller_in_place() -> None:
    net = trained(Net(strength=1.0, warmup_steps=4000), 3)
    net.regularizer._set_steps(1001)
    net.regularizer.steps_as_float = net.regularizer.steps_as_float.to(torch.bfloat16)
    trained(net, 2)
    assert int(net.regularizer.steps) == net.regularizer.steps_as_float == 1003


# Mirrors.


@pytest.mark.parametrize("way", ["replaced", "in place", "data", "assigned", "vector"])
def test_what_is_written_into_buffers_counts(way: str) -> None:
    saved = trained(Net(strength=0.5, warmup_steps=10), 8)
    net = Net(strength=0.5, warmup_steps=10)
    net.load_state_dict({**net.state_dict(), **dict(saved.named_parameters())})
    assert net.regularizer.current_strength == 0.05
    for name, value in saved.regularizer.named_buffers():
        module, _, own = name.rpartition(".")
        parent = net.regularizer.get_submodule(module)
        if way == "replaced":
            parent._buffers[own] = value.clone()
        elif way == "assigned":
            setattr(parent, own, value.clone())
        elif way == "data":
            getattr(parent, own).data.copy_(value)
        elif way == "in place":
            with torch.no_grad():
                getattr(parent, own).copy_(value)
        else:
            getattr(parent, own).set_(value.clone())
    assert net.regularizer.current_strength == saved.regularizer.current_strength == 0.45
    torch.testing.assert_close(
        trained(net, 1).regularizer.relations.matrix(), trained(saved, 1).regularizer.relations.matrix()
    )


def test_the_seed_and_the_draws_follow_their_buffers() -> None:
    gramian = torch.randn(5, 4, dtype=torch.float64)
    gramian = gramian @ gramian.T
    used, other = PCGrad(3), PCGrad(4)
    used(gramian)
    other._buffers.update({name: value.clone() for name, value in used._buffers.items()})
    assert other.seed == 3
    assert torch.equal(other(gramian), used(gramian))


def test_buffers_that_nobody_has_set_are_refused() -> None:
    net = Net(strength=0.5)
    for module in net.regularizer.modules():
        module._buffers.update({name: torch.zeros_like(value) for name, value in module._buffers.items()})
    net(torch.randn(4, 6))
    with pytest.raises(StateMismatchError, match="nobody has set"):
        net.regularizer()


# The meta device.


@pytest.mark.parametrize("rule", ["entropic", "per_task", "projected", "authors", "fixed"])
@pytest.mark.parametrize("inside", [True, False])
def test_state_is_fresh_behind_the_meta_device(rule: str, inside: bool) -> None:
    with torch.device("meta"):
        net = Net(relations=rule, surgery=PCGrad(5)) if inside else Net()
        regularizer = (
            net.regularizer if inside else SaliencyRegularizer(net, "heads", relations=rule, strength=0.1, metric="l1")
        )
    net.to_empty(device="cpu")
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    net(torch.randn(4, 6))
    assert regularizer() > 0
    regularizer.step()
    fresh = SaliencyRegularizer(None, tasks=list(TASKS), relations=rule, strength=0.1, metric="l1")
    assert int(regularizer.steps) == 1
    torch.testing.assert_close(regularizer.relations.matrix().sum(), fresh.relations.matrix().sum())


def test_state_stays_where_the_model_is_sent_to_the_meta_device_and_back() -> None:
    net = trained(Net(strength=0.5), 3)
    before = {name: value.clone() for name, value in net.regularizer.state_dict().items()}
    net.to("meta").to_empty(device="cpu")
    assert all(torch.equal(value, before[name]) for name, value in net.regularizer.state_dict().items())
    net.to(torch.bfloat16)
    assert all(torch.equal(value, before[name]) for name, value in net.regularizer.state_dict().items())
    with torch.device("meta"), pytest.raises(ConfigurationError, match="has no values"):
        RelationWeights(2, "fixed", matrix=torch.ones(2, 2))


# Refused states.


def nan(state: dict[str, Any]) -> None:
    state["relations.running_distances"] = torch.full((3,), torch.nan, dtype=torch.float64)


def negative(state: dict[str, Any]) -> None:
    state["relations.running_weights"] = -torch.ones(3, dtype=torch.float64)


def infinite(state: dict[str, Any]) -> None:
    state["pending.distances"] = torch.full((3, 3), torch.inf, dtype=torch.float64)


def before_the_first(state: dict[str, Any]) -> None:
    state["steps"], state["steps_as_float"] = torch.tensor(-3), torch.tensor(-3.0)


def a_negative_step(state: dict[str, Any]) -> None:
    state["steps"] = torch.tensor(-1)


def both_negative(state: dict[str, Any]) -> None:
    state["steps"], state["steps_as_float"] = torch.tensor(-1), torch.tensor(-1.0, dtype=torch.float64)


def a_negative_twin(state: dict[str, Any]) -> None:
    state["steps_as_float"] = torch.tensor(-1.0, dtype=torch.float64)


def no_number(state: dict[str, Any]) -> None:
    state["steps_as_float"] = torch.tensor(torch.nan, dtype=torch.float64)


def no_end(state: dict[str, Any]) -> None:
    state["steps_as_float"] = torch.tensor(torch.inf, dtype=torch.float64)


def other_shape(state: dict[str, Any]) -> None:
    state["pending.samples"] = torch.zeros(4, 4)


def no_tensor(state: dict[str, Any]) -> None:
    state["sampler.calls"] = 5


def missing(state: dict[str, Any]) -> None:
    del state["sampler.calls"]


def foreign(state: dict[str, Any]) -> None:
    state["relations.foreign"] = torch.zeros(3)


@pytest.mark.parametrize(
    "spoil",
    [
        *(
            nan,
            negative,
            infinite,
            before_the_first,
            a_negative_step,
            both_negative,
            a_negative_twin,
            no_number,
            no_end,
        ),
        *(other_shape, no_tensor, missing, foreign),
    ],
    ids=lambda own: own.__name__,
)
def test_a_refused_state_changes_nothing(spoil: Any) -> None:
    state = dict(trained(Net(warmup_steps=100), 50).regularizer.state_dict())
    spoil(state)
    regularizer = trained(Net(warmup_steps=100), 2).regularizer
    before = {name: value.clone() for name, value in regularizer.state_dict().items()}
    with pytest.raises(StateMismatchError):
        regularizer.load_state_dict(state)
    for name, value in regularizer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_refused_state_of_parameter_surgery_changes_nothing() -> None:
    surgery = ParameterSurgery(Net(), tasks=["a", "b"])
    state = dict(surgery.state_dict(), steps=torch.tensor(-1), weights=torch.tensor([3.0, -1.0]))
    with pytest.raises(StateMismatchError):
        surgery.load_state_dict(state)
    assert torch.isnan(surgery.weights).all()
    surgery.load_state_dict({**state, "steps": torch.tensor(4)})
    assert surgery.weights.tolist() == [3.0, -1.0]


# Weightings with state.


class Remembering:
    """Weights that begin at one, and grow with each call."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.kept: Tensor | None = None

    def __call__(self, gramian: Tensor) -> Tensor:
        fresh = torch.ones(len(gramian), dtype=gramian.dtype)
        self.kept = fresh if self.kept is None else self.kept + gramian.diagonal()
        return self.kept


def weights_after(weighting: Any, without: str) -> list[float]:
    torch.manual_seed(0)
    net = Net()
    surgery = FeatureSurgery(net, heads="heads", weighting=weighting)
    for absent in without:
        outputs = net(torch.randn(8, 6))
        sum(output.square().mean() for task, output in outputs.items() if task != absent).backward()
    assert surgery.report is not None
    return surgery.report.weights.tolist()


class Averaging(Remembering):
    """A running mean of weights that favour short gradients: a zero gradient would get them all."""

    def __call__(self, gramian: Tensor) -> Tensor:
        short = 1 / (gramian.diagonal() + 1e-6)
        new = len(gramian) * short / short.sum()
        self.kept = new if self.kept is None else (self.kept + new) / 2
        return self.kept


def test_state_stays_with_its_task() -> None:
    """One that can see zero gradients keeps what it has, also of an absent task."""
    weighting, ranks = Remembering(), Ranks()
    for gramian, wanted in (
        ([1.0, 0.0, 2.0], [1.0, 1.0, 1.0]),
        ([1.0, 3.0, 0.0], [2.0, 4.0, 1.0]),
        ([5.0, 0.0, 4.0], [7.0, 1.0, 5.0]),
        ([1.0, 1.0, 1.0], [8.0, 5.0, 6.0]),
    ):
        assert task_weights(weighting, torch.diag(torch.tensor(gramian)), ranks).tolist() == wanted


def test_state_does_not_go_to_other_tasks() -> None:
    """One that would give all weight to zero gradients does not see them, and is begun anew."""
    fresh = weights_after_same_batch(Averaging(), "c")
    kept = weights_after(Averaging(), "cc")  # it is kept while the tasks stay
    assert kept[:2] != weights_after(Averaging(), "c")[:2]
    with pytest.warns(UserWarning, match="Averaging keeps state") as told:
        assert weights_after_same_batch(Averaging(), "bbbcbc")[:2] == fresh[:2]
    assert len(told) == 1
    assert fresh[:2] != [1.0, 1.0]


def test_a_weighting_that_cannot_leave_tasks_out_sees_all() -> None:
    def fixed(gramian: Tensor) -> Tensor:
        if len(gramian) != 3:
            raise ValueError("three tasks only")
        return torch.tensor([1.0, 2.0, 3.0])

    found = task_weights(fixed, torch.diag(torch.tensor([1.0, 0.0, 2.0])), Ranks())
    assert found.tolist() == [1.0, 1.0, 3.0]


def of_torchjd(name: str) -> Any:
    jd = pytest.importorskip("torchjd.aggregation")
    if not hasattr(jd, name.partition(" ")[0]):
        pytest.skip("not in this version")
    if name.startswith("CRMOGM"):
        return jd.CRMOGMWeighting(getattr(jd, name.partition(" of ")[2])())
    return jd.PCDWeighting(tau=torch.tensor([0.3, 0.5])) if name == "PCDWeighting" else getattr(jd, name)()


@pytest.mark.parametrize("name", ["MoDoWeighting", "SDMGradWeighting", "CRMOGMWeighting of MGDAWeighting"])
def test_those_of_torchjd_that_look_for_short_combinations_begin_anew(name: str) -> None:
    fresh = weights_after(of_torchjd(name), "c")
    with pytest.warns(UserWarning, match="keeps state"):
        carried = weights_after_same_batch(of_torchjd(name), "bbc")
    assert carried[2] != carried[2]  # NaN: absent
    torch.testing.assert_close(carried[:2], fresh[:2])


@pytest.mark.parametrize("name", ["GradVacWeighting", "PCDWeighting", "CRMOGMWeighting of UPGradWeighting"])
def test_those_of_torchjd_that_keep_their_state(name: str) -> None:
    """They see the whole Gramian, with zero rows in their place, also where a single task has a gradient."""
    generator = torch.Generator().manual_seed(0)
    weighting, alone = of_torchjd(name), of_torchjd(name)
    state = torch.get_rng_state()
    for step, absent in enumerate([[], [1], [2], [], [1, 2], [0, 1], [0]]):
        gradients = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        gradients[absent] = 0
        gramian = gradients @ gradients.T
        torch.manual_seed(step)
        wanted = alone(gramian)
        torch.manual_seed(step)
        found = task_weights(weighting, gramian, Ranks())
        present = [task for task in range(3) if task not in absent]
        torch.testing.assert_close(found[present], wanted[present], msg=f"{name} {step}")
        assert bool((found[absent] == 1).all())
    torch.set_rng_state(state)


def weights_after_same_batch(weighting: Any, without: str) -> list[float]:
    torch.manual_seed(0)
    net = Net()
    surgery = FeatureSurgery(net, heads="heads", weighting=weighting)
    inputs = torch.randn(8, 6)
    for absent in without:
        sum(output.square().mean() for task, output in net(inputs).items() if task != absent).backward()
    assert surgery.report is not None
    return surgery.report.weights.tolist()


# Changing sets of tasks.


class MayRead(nn.Module):
    """A head that may read the output of another one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 1), nn.Tanh())

    def forward(self, feature: Tensor, other: Tensor | None = None) -> Tensor:
        own = self.layers(feature)
        return own if other is None else own * other


class Chained(nn.Module):
    """Head ``b`` reads the output of ``a``, if that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(6, 8)
        self.heads = nn.ModuleDict({task: MayRead() for task in "abcd"})

    def forward(self, x: Tensor, tasks: str) -> dict[str, Tensor]:
        return self.from_feature(self.backbone(x), tasks)

    def from_feature(self, feature: Tensor, tasks: str) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = {}
        for task in tasks:
            outputs[task] = self.heads[task](feature, outputs.get("a") if task == "b" else None)
        return outputs


@pytest.mark.parametrize("sets", [["bc", "cd", "abc"], ["abcd", "cd"], ["cd", "bd", "ab"]])
def test_penalties_of_changing_sets(sets: list[str]) -> None:
    torch.manual_seed(0)
    model, x = Chained().double(), torch.randn(5, 6, dtype=torch.float64)
    rule = RelationWeights(4, "fixed", mass=6.0)
    regularizer = SaliencyRegularizer(model, heads="heads", strength=1.0, relations=rule, metric="l1")
    for tasks in sets:
        outputs = model(x, tasks)
        found = regularizer()
        regularizer.enabled = False
        feature = model.backbone(x).detach().requires_grad_()
        outputs = model.from_feature(feature, tasks)
        rows = [torch.autograd.grad(output.sum(), feature, retain_graph=True)[0] for output in outputs.values()]
        regularizer.enabled = True
        expected = slow_distances(rows, "l1", "mean").triu(1).sum()
        torch.testing.assert_close(found.detach(), expected.detach())


@pytest.mark.parametrize("options", [{}, {"run_all_heads": True}, {"max_tasks_per_step": 4}, {"surgery": True}])
def test_what_is_known_of_sets_does_not_grow(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = Net()
    heads = nn.ModuleList([nn.Sequential(nn.Linear(8, 2), nn.Tanh(), nn.Linear(2, 1)) for _ in range(12)])
    model = nn.ModuleDict({"backbone": net.backbone, "heads": heads})
    if "surgery" in options:
        options = {"surgery": PCGrad()}
    regularizer = SaliencyRegularizer(model, heads="heads", strength=0.1, **{"metric": "l1", **options})
    sizes = []
    for step in range(40):
        ran = sorted(torch.randperm(12, generator=torch.Generator().manual_seed(step))[:8].tolist())
        feature = model["backbone"](torch.randn(3, 6))
        for task in ran:
            heads[task](feature)
        regularizer()
        sizes.append(len(pickle.dumps(regularizer)))
    assert sizes[-1] <= sizes[20] + 64


@pytest.mark.parametrize("tasks", [3, 321, 1281])
def test_l1_of_many_tasks(tasks: int) -> None:
    saliencies = torch.randn(tasks, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    saliencies.requires_grad_()
    found = task_distances(saliencies)
    some = torch.arange(0, tasks, max(tasks // 3, 1))
    expected = (saliencies[some, None] - saliencies[None, some]).abs().sum(3).mean(2)
    torch.testing.assert_close(found[some][:, some], expected)
    (gradient,) = torch.autograd.grad(found[0, 1:].sum(), saliencies)
    torch.testing.assert_close(gradient[0], (saliencies[0] - saliencies[1:]).sign().sum(0) / 2)


# Heads that name their argument differently.


class Named(nn.Linear):
    def forward(self, feature: Tensor) -> Tensor:
        return super().forward(feature)


class Two(nn.Linear):
    def forward(self, feature: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(feature) * scale


def test_heads_are_run_by_their_own_names() -> None:
    model = nn.ModuleDict({"heads": nn.ModuleDict({"a": Named(4, 1), "b": nn.Linear(4, 1), "c": Two(4, 1)})})
    regularizer = SaliencyRegularizer(model, heads="heads", run_all_heads=True, strength=1.0, metric="l1")
    model["heads"]["a"](feature=torch.randn(5, 4, requires_grad=True))
    rows = [head.weight[0] for head in model["heads"].values()]
    expected = sum((rows[i] - rows[j]).abs().sum() for i, j in [(0, 1), (0, 2), (1, 2)]) / 3
    torch.testing.assert_close(regularizer(), expected)
    model["heads"]["c"](feature=torch.randn(5, 4, requires_grad=True), scale=2.0)
    with pytest.raises(CaptureError, match="Use the same names"):
        regularizer()
    assert issubclass(CaptureError, SaliencyRegError)
