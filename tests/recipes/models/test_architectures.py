"""What all architectures have in common; and that they learn."""

import io

import pytest
import torch
from torch.nn import functional
from torchjd.aggregation import UPGradWeighting

from recipes.data.digits import digit_splits
from recipes.data.task_kinds import BINARY
from recipes.methods.attach import attach
from recipes.methods.methods import METHODS
from recipes.models.architectures.blueprint import Blueprint
from recipes.models.architectures.mmoe import MMoE
from recipes.models.architectures.registry import ARCHITECTURES, build, parameter_groups, parameters_of
from recipes.models.architectures.single_task import merged
from recipes.models.small_networks import SharedNetwork, small_blueprint
from recipes.runtime.errors import OptionError
from recipes.training.metrics import macro, task_scores
from recipes.training.optimizers import OPTIMIZERS
from saliency_reg import FeatureSurgery, SaliencyRegularizer
from saliency_reg.errors import TaskError

from .parts import OUTPUTS, blueprint, inputs_of, scramble

all_architectures = pytest.mark.parametrize("name", list(ARCHITECTURES))


@all_architectures
class TestEach:
    @pytest.mark.parametrize("batch", [0, 1, 5])
    def test_shapes_and_names(self, name, batch):
        outputs = build(name, blueprint()).double()(inputs_of(batch))
        assert {task: tuple(output.shape) for task, output in outputs.items()} == {
            task: (batch,) if outputs == 1 else (batch, outputs) for task, outputs in OUTPUTS.items()
        }

    def test_half_precision(self, name):
        model = scramble(build(name, blueprint())).float()
        inputs = inputs_of(5).float()
        with torch.autocast("cpu", torch.bfloat16):
            halves = model(inputs)
            sum(output.float().sum() for output in halves.values()).backward()
        for task, output in model(inputs).items():
            torch.testing.assert_close(halves[task].float(), output, rtol=0.05, atol=0.1)

    def test_samples_do_not_mix(self, name):
        model = scramble(build(name, blueprint()))
        whole = model(inputs_of(5))
        for row in range(5):
            for task, output in model(inputs_of(5)[row : row + 1]).items():
                torch.testing.assert_close(output[0], whole[task][row])

    def test_every_parameter_takes_part(self, name):
        """Or DDP would stop."""
        model = scramble(build(name, blueprint()))
        sum(output.square().sum() for output in model(inputs_of(5)).values()).backward()
        assert [own for own, parameter in model.named_parameters() if parameter.grad is None] == []

    def test_state_goes_round(self, name):
        one, other = scramble(build(name, blueprint()), 1), scramble(build(name, blueprint()), 2)
        file = io.BytesIO()
        torch.save(one.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file))
        assert all(torch.equal(output, other(inputs_of(5))[task]) for task, output in one(inputs_of(5)).items())

    def test_the_seed_is_all_there_is(self, name):
        outputs = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            outputs.append(build(name, blueprint()).double()(inputs_of(5))["type"])
        assert torch.equal(outputs[0], outputs[1])
        assert not torch.equal(outputs[0], outputs[2])

    def test_groups_of_an_optimizer(self, name):
        model = build(name, blueprint())
        groups = parameter_groups(model, 0.01, 0.1)
        assert sorted(id(own) for group in groups for own in group["params"]) == sorted(map(id, model.parameters()))
        expected = {"mmoe": (3, 0.01), "ple": (7, 0.01), "cross_stitch": (2, 0.1)}.get(name)
        found = [(len(group["params"]), group["lr"]) for group in groups if group["weight_decay"] == 0]
        assert found == ([] if expected is None else [expected])
        torch.optim.AdamW(groups)
        for make in OPTIMIZERS.values():
            make(model, 0.01, 0.1)

    def test_learns_digits(self, name):
        scores = macro(_scores_of(_trained(name)))
        assert scores["auc"] > 0.95, scores

    def test_one_task(self, name):
        if name == "branching":  # there is nothing to split
            with pytest.raises(TaskError, match="at least 2"):
                build(name, blueprint(["alone"]))
            return
        outputs = build(name, blueprint(["alone"])).double()(inputs_of(3))
        assert outputs["alone"].shape == (3,)


def _trained(name):
    torch.manual_seed(0)
    splits = digit_splits(0, 30, 10)
    model = build(name, small_blueprint(splits.tasks, "gelu"))
    optimizer = torch.optim.AdamW(parameter_groups(model, 3e-3, 0.01))
    for _ in range(10 if name in ("mmoe", "ple") else 5):  # their networks are deeper
        for rows in torch.randperm(len(splits.train.labels)).split(32):
            outputs = model(splits.train.inputs[rows])
            loss = sum(
                functional.binary_cross_entropy_with_logits(outputs[task], splits.train.labels[rows, index])
                for index, task in enumerate(splits.tasks)
            )
            if name == "soft_sharing":
                loss = loss + 0.001 * model.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


@torch.no_grad()
def _scores_of(model):
    test = digit_splits(0, 30, 10).test
    outputs = torch.stack(list(model.eval()(test.inputs).values()), 1)
    return task_scores(outputs, test.labels, dict.fromkeys(model.tasks, BINARY))


def test_merged_networks_are_better_than_chance():
    trained = _trained("single_task")
    torch.manual_seed(0)
    start = build("single_task", small_blueprint(trained.tasks, "gelu")).backbones[0].state_dict()
    assert macro(_scores_of(merged(trained, start)))["auc"] > 0.7


def test_hard_sharing_of_digits_is_the_network_of_the_studies():
    models = []
    for make in (
        lambda: SharedNetwork(["a", "b"], "gelu"),
        lambda: build("hard_sharing", small_blueprint(["a", "b"], "gelu")),
    ):
        torch.manual_seed(0)
        models.append(make())
    images = torch.randn(5, 1, 8, 8)
    assert all(torch.equal(output, models[1](images)[task]) for task, output in models[0](images).items())
    assert parameters_of(models[0]) == parameters_of(models[1])


class TestHardSharingWithTheLibrary:
    def losses(self, model):
        return {task: output.square().mean() for task, output in model(inputs_of(6)).items()}

    def test_finds_heads_whose_names_no_module_can_have(self):
        model = scramble(build("hard_sharing", blueprint()))
        regularizer = SaliencyRegularizer(model, heads="heads", tasks=model.tasks, strength=0.1)
        losses = self.losses(model)
        penalty = regularizer()
        assert penalty.item() > 0
        (sum(losses.values()) + penalty).backward()
        assert list(regularizer.report.tasks) == list(OUTPUTS)

    def test_surgery_at_its_feature(self):
        found = []
        for with_surgery in (False, True):
            model = scramble(build("hard_sharing", blueprint()))
            if with_surgery:
                surgery = FeatureSurgery(model, heads="heads", tasks=model.tasks, weighting=UPGradWeighting())
            sum(self.losses(model).values()).backward()
            found.append(model.backbone[0].weight.grad)
        assert list(surgery.report.tasks) == list(OUTPUTS)
        assert not torch.equal(*found)

    @pytest.mark.parametrize(
        "key", ["srdml", "srdml_default", "pcgrad", "pcgrad@parameters", "srdml+pcgrad", "mgda_ub"]
    )
    def test_methods_attach(self, key):
        model = scramble(build("hard_sharing", blueprint()))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        share = "default" if key == "srdml_default" else None
        backward = attach(METHODS[key], model, model.tasks, optimizer, strength=0.1, share=share, batch_size=6, seed=0)
        losses = list(self.losses(model).values())
        arguments = {"losses": torch.stack(losses).detach().sum()} if backward.regularizer else None
        backward(losses, arguments=arguments)
        optimizer.step()
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_no_such_architecture():
    with pytest.raises(OptionError, match="no architecture 'moe'. Use one of hard_sharing, single_task, merged, mmoe"):
        build("moe", blueprint())


@pytest.mark.parametrize(
    ("tasks", "width", "message"),
    [
        ((), 1, "one task or more"),
        (("a", "a"), 1, r"found \('a', 'a'\)"),
        ("ab", 1, "found 'ab'"),
        (("a",), 0, "found 0"),
    ],
)
def test_no_such_blueprint(tasks, width, message):
    own = blueprint()
    with pytest.raises(OptionError, match=message):
        Blueprint(tasks, own.backbone, own.head, width, own.tower, own.vector)


def test_parameters_are_counted():
    """By hand: backbone 57 + 24, heads of 24 features, towers of the experts' width."""
    own = blueprint()
    backbone, heads = (2 * 9 + 1) * 3 + (3 + 1) * 6, 25 * 5
    experts = 3 * (6 + 1) * 4
    towers = (4 + 1) * 5
    assert parameters_of(build("hard_sharing", own)) == backbone + heads
    assert parameters_of(build("single_task", own)) == 3 * backbone + heads
    assert parameters_of(build("cross_stitch", own)) == 3 * backbone + heads + 2 * 9
    assert parameters_of(MMoE(own, experts=3, expert_width=4)) == backbone + experts + 3 * 6 * 3 + towers
    frozen = build("hard_sharing", own)
    frozen.backbone.requires_grad_(False)
    assert parameters_of(frozen) == heads
