"""Others that run an attached model to read it get what the plain model gives them, or an error that says what to do."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

from saliency_reg import FeatureSurgery, PCGrad, SaliencyRegularizer
from saliency_reg.errors import ReaderError, SaliencyRegError, ScriptingError, SecondDerivativeError
from saliency_reg.regularizer.obstacles import Obstacles
from tests.support.attachment import fingerprint


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.heads = nn.ModuleDict({t: nn.Sequential(nn.Linear(8, 4), nn.GELU(), nn.Linear(4, 3)) for t in "ab"})

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        feature = self.backbone(x)
        return tuple(head(feature) for head in self.heads.values())


def make() -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    return Net().double(), torch.randn(4, 6, dtype=torch.float64)


ATTACHED: dict[str, Callable[[nn.Module], Any]] = {
    "penalty": lambda model: SaliencyRegularizer(model, "heads", strength=0.1, metric="l1"),
    "penalty at a named feature": lambda model: SaliencyRegularizer(
        model, "heads", feature="backbone", strength=0.1, metric="l1"
    ),
    "penalty and surgery": lambda model: SaliencyRegularizer(
        model, "heads", surgery=PCGrad(), strength=0.1, metric="l1"
    ),
    "surgery at a named feature": lambda model: FeatureSurgery(model, "heads", feature="backbone"),
}
attached = pytest.mark.parametrize("attach", ATTACHED.values(), ids=ATTACHED.keys())


def loss_of(outputs: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([output.square().mean() for output in outputs]).sum()


def gradients_of_program(program: Any, x: Tensor) -> dict[str, Tensor]:
    loss_of(program(x)).backward()
    return {name: parameter.grad for name, parameter in program.named_parameters()}


def exported(model: nn.Module, x: Tensor, strict: bool) -> dict[str, Tensor]:
    return gradients_of_program(torch.export.export(model, (x,), strict=strict).module(), x)


def traced(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is deprecated
        return gradients_of_program(torch.jit.trace(model, x), x)


def made_by_fx(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    from torch.fx.experimental.proxy_tensor import make_fx

    weights = dict(model.named_parameters())
    program = make_fx(lambda weights, x: functional_call(model, weights, (x,)))(weights, x)
    return dict(zip(weights, torch.autograd.grad(loss_of(program(weights, x)), list(weights.values()))))


def in_a_transform(model: nn.Module, x: Tensor, transform: Callable[..., Any]) -> dict[str, Tensor]:
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    return transform(lambda weights, x: loss_of(functional_call(model, weights, (x,))), weights, x)


def per_sample(loss: Any, weights: Any, x: Tensor) -> Any:
    return vmap(grad(lambda w, row: loss(w, row[None])), in_dims=(None, 0))(weights, x)


def forward_mode(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    with forward_ad.dual_level():
        outputs = model(forward_ad.make_dual(x, torch.ones_like(x)))
        return {str(i): forward_ad.unpack_dual(output).tangent.detach() for i, output in enumerate(outputs)}


READERS: dict[str, Callable[[nn.Module, Tensor], dict[str, Tensor]]] = {
    "export": lambda model, x: exported(model, x, False),
    "strict export": lambda model, x: exported(model, x, True),
    "trace": traced,
    "make_fx": made_by_fx,
    "vmap of grad": lambda model, x: in_a_transform(model, x, per_sample),
    "jacrev": lambda model, x: in_a_transform(model, x, lambda loss, w, x: {"": jacrev(loss, 1)(w, x)}),
    "hessian": lambda model, x: in_a_transform(model, x, lambda loss, w, x: {"": hessian(loss, 1)(w, x)}),
    "jvp": lambda model, x: in_a_transform(
        model, x, lambda loss, w, x: {"": jvp(lambda x: loss(w, x), (x,), (torch.ones_like(x),))[1]}
    ),
    "forward mode": forward_mode,
}


@attached
@pytest.mark.parametrize("read", READERS.values(), ids=READERS.keys())
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_what_is_read_is_that_of_the_plain_model(read: Callable[..., dict[str, Tensor]], attach: Any) -> None:
    model, x = make()
    expected = read(copy.deepcopy(model), x)
    held = attach(model)
    outputs = model(x)  # which the reader does not displace
    found = read(model, x)
    assert expected
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=name)
    if isinstance(held, SaliencyRegularizer):
        model.zero_grad()
        (loss_of(outputs) + held()).backward()
        plain = make()[0]
        again = attach(plain)
        (loss_of(plain(x)) + again()).backward()
        for parameter, other in zip(model.parameters(), plain.parameters()):
            assert torch.equal(parameter.grad, other.grad)


def test_many_gradients_at_once_are_a_measurement() -> None:
    """A Jacobian by batched backward passes goes through the fork as without surgery."""
    model, x = make()
    jacobian = torch.autograd.functional.jacobian
    expected = jacobian(lambda x: torch.cat(model(x)), x, vectorize=True)
    surgery = FeatureSurgery(model, "heads")
    torch.testing.assert_close(jacobian(lambda x: torch.cat(model(x)), x, vectorize=True), expected)
    assert surgery.report is None


@pytest.mark.parametrize("transform", [grad, lambda f: vmap(f), lambda f: lambda x: jvp(f, (x,), (x,))])
def test_a_call_within_a_transform_is_refused(transform: Any) -> None:
    model, x = make()
    regularizer = SaliencyRegularizer(model, "heads", strength=0.1, metric="l1")
    with pytest.raises(ReaderError, match=r"within a transform of torch.func.*ordinary training step"):
        transform(lambda x: loss_of(model(x[None] if x.ndim == 1 else x)) + regularizer())(x)


def test_scripting_says_what_to_do() -> None:
    scripted = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    surgery = FeatureSurgery(scripted, "2", tasks=["a", "b"], feature="1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for one in (scripted, scripted[2]):
            with pytest.raises(ScriptingError, match=r"Call .remove\(\) on it before torch.jit.script"):
                torch.jit.script(one)
        surgery.remove()
        torch.jit.script(scripted)


def quantized_dynamically(model: nn.Module) -> None:
    torch.ao.quantization.quantize_dynamic(model.float().eval(), {nn.Linear}, inplace=True)


def prepared_for_training(model: nn.Module) -> None:
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    torch.ao.quantization.prepare_qat(model.float().train(), inplace=True)


def swapped_by_hand(model: nn.Module) -> None:
    """As libraries do that put layers of their own into a model, hooks included."""
    for task in "ab":
        old, new = model.heads[task], nn.Linear(8, 3).double()
        for hook in old._forward_pre_hooks.values():
            new.register_forward_pre_hook(hook)
        for hook in old._forward_hooks.values():
            new.register_forward_hook(hook)
        model.heads[task] = new


@pytest.mark.parametrize("swap", [quantized_dynamically, prepared_for_training, swapped_by_hand])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Please use quant_min", "ignore:torch.ao")
@pytest.mark.filterwarnings(
    "ignore:_aminmax is deprecated", "ignore:.*quantize_per_tensor.*", "ignore:.*TypedStorage.*"
)
def test_modules_that_are_swapped(swap: Callable[[nn.Module], None]) -> None:
    model, x = make()
    for task in "ab":
        model.heads[task] = nn.Linear(8, 3).double()
    regularizer = SaliencyRegularizer(model, "heads", feature="backbone.0", surgery=PCGrad(), strength=0.1, metric="l1")
    swap(model)
    x = x.to(next((parameter.dtype for parameter in model.parameters()), torch.float32))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(x)
        model(x)
    told = [str(one.message) for one in caught if "taken the place" in str(one.message)]
    assert len(told) == 1
    assert "Call .remove() before modules are swapped" in told[0]
    with pytest.raises(SaliencyRegError):
        regularizer()
    regularizer.remove()
    assert not any("CleanState" in str(value) for value in fingerprint(model).values())
    for module in model.modules():
        assert not any("ModuleHook" in type(hook).__name__ for hook in module._forward_hooks.values())
        assert not any("ModuleHook" in type(hook).__name__ for hook in module._forward_pre_hooks.values())


# Backward hooks of others, and compiled functions around the call.


def watch(model: nn.Module) -> None:
    """What a library of per-sample gradients does, in short."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.saved = []
            module.register_forward_hook(lambda module, args, output: module.saved.append(args[0].detach()))
            module.register_full_backward_hook(keep_per_sample)


def keep_per_sample(module: nn.Module, _: Any, gradients: Any) -> None:
    module.per_sample = torch.einsum("bi,bj->bij", gradients[0], module.saved.pop())


def linear_heads(model: Net) -> None:
    for task in "ab":
        model.heads[task] = nn.Linear(8, 1).double()


def on_the_heads(model: Net) -> None:
    watch(model)


def on_one_activation(model: Net) -> None:
    model.heads["b"][1].register_full_backward_pre_hook(lambda module, gradients: None)


def of_the_old_kind(model: Net) -> None:
    model.heads["a"].register_backward_hook(lambda module, inputs, outputs: None)


def between_feature_and_heads(model: Net) -> None:
    model.backbone[1].register_full_backward_hook(lambda module, inputs, outputs: None)


@pytest.mark.parametrize(
    ("put", "where"),
    [
        (on_the_heads, r"0 \(Linear\) in the head of task 'a'"),
        (on_one_activation, r"1 \(GELU\) in the head of task 'b'"),
        (of_the_old_kind, r"the head \(Sequential\) of task 'a'"),
        (between_feature_and_heads, "a module between the feature map and the outputs"),
    ],
)
@pytest.mark.parametrize("surgery", [False, True])
@pytest.mark.filterwarnings("ignore:Full backward hook is firing", "ignore:Using a non-full backward hook")
def test_backward_hooks_of_others(put: Callable[[Net], None], where: str, surgery: bool) -> None:
    model, x = make()
    put(model)
    loss_of(model(x)).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    options: dict[str, Any] = {"feature": "backbone.0", "surgery": (lambda g: torch.ones(2)) if surgery else None}
    with attach_to(model, **options) as regularizer:
        model(x)
        with pytest.raises(ReaderError, match=f"backward hooks on {where}.*Take them off"):
            regularizer()
    for module in model.modules():
        vars(module).pop("per_sample", None)
        if hasattr(module, "saved"):
            module.saved.clear()
    model.zero_grad()
    with attach_to(model, strength=0.0, **options) as regularizer:
        with pytest.warns(UserWarning, match=f"backward hooks on {where}.*no saliencies are taken") as caught:
            penalties = [penalty_and_backward(model, x, regularizer) for _ in range(2)]
        assert penalties == [0, 0]
        assert sum("no saliencies" in str(one.message) for one in caught) == 1
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * expected[name], rtol=1e-12, atol=1e-15)
    for module in model.modules():
        if hasattr(module, "saved"):
            torch.testing.assert_close(2 * module.per_sample.sum(0), module.weight.grad)


def attach_to(model: nn.Module, **options: Any) -> SaliencyRegularizer:
    return SaliencyRegularizer(model, "heads", **{"strength": 0.1, "metric": "l1", **options})


def penalty_and_backward(model: Net, x: Tensor, regularizer: SaliencyRegularizer) -> float:
    loss = loss_of(model(x))
    penalty = regularizer()
    (loss + penalty).backward()
    return float(penalty.detach())


def test_backward_hooks_where_nothing_is_differentiated() -> None:
    """Linear heads are closed form, and the backbone is none of our business. Hooks that were taken off are forgotten."""
    model, x = make()
    model.backbone[0].register_full_backward_hook(lambda module, inputs, outputs: None)
    handle = model.heads["a"].register_full_backward_hook(lambda module, inputs, outputs: None)
    with attach_to(model) as regularizer:
        model(x.requires_grad_())
        with pytest.raises(ReaderError):
            regularizer()
        handle.remove()
        model.heads["a"].register_forward_hook(lambda *_: None)
        assert penalty_and_backward(model, x, regularizer) > 0
    linear_heads(model)
    model.heads["a"].register_full_backward_hook(lambda module, inputs, outputs: None)
    with attach_to(model) as regularizer:
        assert penalty_and_backward(model, x, regularizer) > 0


def test_a_hook_between_feature_and_heads_is_refused_in_every_call() -> None:
    model, x = make()
    handle = None
    with attach_to(model, feature="backbone.0") as regularizer:
        for step in range(8):
            if step == 2:  # after the first calls
                handle = model.backbone[1].register_full_backward_hook(lambda module, inputs, outputs: None)
            if step == 6:
                handle.remove()
            model(x)
            torch.zeros(1, requires_grad=True).register_hook(print)  # other hooks come and go
            if 2 <= step < 6:
                with pytest.raises(ReaderError, match="a module between the feature map and the outputs"):
                    regularizer()
            else:
                assert regularizer() > 0
                assert penalty_and_backward(model, x, regularizer) > 0


def test_a_hook_that_is_put_in_the_place_of_another() -> None:
    model, x = make()
    with attach_to(model, feature="backbone.0") as regularizer:
        assert penalty_and_backward(model, x, regularizer) > 0
        for part in (model.heads["a"], model.backbone[1], model.heads["b"][1]):
            handle = part.register_full_backward_hook(lambda module, inputs, outputs: None)
            for _ in range(2):
                model(x)
                with pytest.raises(ReaderError, match="backward hooks on"):
                    regularizer()
            handle.remove()
        assert penalty_and_backward(model, x, regularizer) > 0


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.GELU(), nn.Linear(4, 1))


@pytest.mark.parametrize("head", [normalised, lambda: nn.Sequential(nn.Linear(8, 4), nn.GELU(), nn.Linear(4, 1))])
@pytest.mark.parametrize("surgery", [False, True])
@pytest.mark.parametrize("feature", [None, "backbone"])
def test_how_often_hooks_are_looked_for_does_not_grow_with_the_calls(
    head: Callable[[], nn.Module], surgery: bool, feature: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, look = [], Obstacles._look
    monkeypatch.setattr(Obstacles, "_look", lambda *args, **kwargs: looks.append(1) or look(*args, **kwargs))
    model, x = make()
    for task in "ab":
        model.heads[task] = head().double()
    with attach_to(model, surgery=PCGrad() if surgery else None, feature=feature) as regularizer:
        found = []
        for _ in range(12):
            penalty_and_backward(model, x, regularizer)
            found.append(len(looks))
    assert 1 <= found[3] == found[-1] <= 3, found


class SyncBatchNorm(torch.autograd.Function):
    """As that of torch, which needs a group of processes on GPUs: its backward is a plain function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


class Synchronised(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return SyncBatchNorm.apply(x) if self.training else 2 * x


@pytest.mark.parametrize("where", ["head", "between"])
def test_a_batch_norm_that_joins_processes_is_refused_by_name(where: str) -> None:
    model, x = make()
    if where == "head":
        model.heads["b"].insert(1, Synchronised())
    else:
        model.backbone.append(Synchronised())
    with attach_to(model, feature="backbone.0") as regularizer:
        for _ in range(2):
            model(x)
            with pytest.raises(SecondDerivativeError, match=r"SyncBatchNorm in train mode.*put it in eval mode"):
                regularizer()
        regularizer.strength = 0.0
        with pytest.warns(UserWarning, match="no saliencies are taken while the strength is 0"):
            assert penalty_and_backward(model, x, regularizer) == 0
        regularizer.strength = 0.1
        for part in model.modules():
            if isinstance(part, Synchronised):
                part.eval()
        assert penalty_and_backward(model, x, regularizer) > 0
    with attach_to(model.train(), feature="backbone") as behind:
        if where == "between":
            assert penalty_and_backward(model, x, behind) > 0


class Listed(Net):
    """The compiler makes code of this forward, and none of the generator expression above."""

    def forward(self, x: Tensor) -> list[Tensor]:
        feature = self.backbone(x)
        return [head(feature) for head in self.heads.values()]


@pytest.mark.filterwarnings("ignore")  # of the compiler, which looks at tensors that are no leaves
@pytest.mark.parametrize("surgery", [False, True])
@pytest.mark.parametrize("kind", [Net, Listed])
def test_a_compiled_function_that_makes_the_loss(kind: type[Net], surgery: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = kind().double(), torch.randn(4, 6, dtype=torch.float64)
    regularizer = attach_to(model, surgery=PCGrad() if surgery else None)

    def total_loss(x: Tensor) -> Tensor:
        return loss_of(model(x)) + regularizer()

    total_loss(x).backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    regularizer.remove()
    regularizer = attach_to(model, surgery=PCGrad() if surgery else None)
    compiled = torch.compile(total_loss, backend="aot_eager")
    if kind is Listed:
        with pytest.raises(SecondDerivativeError, match=r"Compile the backbone alone, model.backbone.compile\(\)"):
            compiled(x)
        return
    compiled(x).backward()
    for parameter, value in zip(model.parameters(), expected):
        torch.testing.assert_close(parameter.grad, value, rtol=1e-12, atol=1e-15)
