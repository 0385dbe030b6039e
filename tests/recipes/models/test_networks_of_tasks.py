"""Networks of each task: apart, stitched, held together by a penalty, or merged."""

import copy
import math

import pytest
import torch
from torch import nn

from recipes.models.architectures.cross_stitch import CrossStitch, stages_of
from recipes.models.architectures.hard_sharing import hard_sharing
from recipes.models.architectures.registry import build
from recipes.models.architectures.single_task import SingleTask, merged
from recipes.models.architectures.soft_sharing import SoftSharing
from recipes.models.small_resnet import ResidualBlock
from recipes.runtime.errors import OptionError

from .parts import OUTPUTS, WIDTH, backbone, blueprint, inputs_of, scramble

COUNT = len(OUTPUTS)


def seeded(make, seed=0):
    torch.manual_seed(seed)
    return make()


def set_units(model, matrix):
    with torch.no_grad():
        for unit in model.units:
            unit.copy_(matrix)


class TestSingleTask:
    def test_begins_as_hard_sharing(self):
        shared, apart = (
            seeded(lambda name=name: build(name, blueprint()).double()) for name in ("hard_sharing", "single_task")
        )
        inputs = inputs_of(5)
        for task, output in shared(inputs).items():
            assert torch.equal(output, apart(inputs)[task]), task

    def test_shares_nothing(self):
        model = SingleTask(blueprint()).double()
        model(inputs_of(4))["a.b"].sum().backward()
        touched = {task: all(p.grad is not None for p in part.parameters()) for (task,), part in model.parts()}
        assert touched == {"type": False, "a.b": True, "forward": False}
        parameters = [set(map(id, part.parameters())) for _, part in model.parts()]
        assert sum(map(len, parameters)) == len(set().union(*parameters)) == len(list(model.parameters()))


class TestMerged:
    @pytest.mark.parametrize("scaling", [0.0, 0.3, 1.0])
    def test_task_arithmetic(self, scaling):
        model = SingleTask(blueprint()).double()
        start = copy.deepcopy(model.backbones[0].state_dict())
        scramble(model)
        found = merged(model, start, scaling)
        for name, value in found.backbone.state_dict().items():
            moved = sum(own.state_dict()[name] - start[name] for own in model.backbones)
            torch.testing.assert_close(value, start[name] + scaling * moved)
        features = found.backbone(inputs_of(4))
        for (task, output), network in zip(found(inputs_of(4)).items(), model.networks):
            assert torch.equal(output, network[1](features)), task

    def test_by_default_linear_networks_have_the_mean_of_outputs(self):
        def linear():
            return nn.Sequential(nn.Flatten(), nn.Linear(32, WIDTH * 4))

        model = seeded(lambda: SingleTask(blueprint(backbone=linear)).double())
        start = seeded(lambda: SingleTask(blueprint(backbone=linear)).double()).backbones[0].state_dict()
        scramble(model)
        found = merged(model, start)
        mean = sum(own(inputs_of(4)) for own in model.backbones) / COUNT
        torch.testing.assert_close(found.backbone(inputs_of(4)), mean)

    def test_buffers_are_averaged(self):
        model = SingleTask(blueprint(backbone=lambda: nn.Sequential(*backbone(), nn.BatchNorm2d(WIDTH)))).double()
        start = copy.deepcopy(model.backbones[0].state_dict())
        for step in range(5):
            for index, own in enumerate(model.backbones):
                if step >= index:  # 5, 4 and 3 steps
                    own((index + 1) * inputs_of(4))
        found = merged(model, start, 0.3).backbone[-1]
        for name in ("running_mean", "running_var"):
            own = [getattr(one[-1], name) for one in model.backbones]
            assert not torch.equal(own[0], own[1])
            torch.testing.assert_close(getattr(found, name), sum(own) / COUNT)
        assert found.num_batches_tracked.item() == 4

    def test_half_precision_loses_no_small_steps(self):
        model = SingleTask(blueprint()).bfloat16()
        start = copy.deepcopy(model.backbones[0].state_dict())
        found = merged(model, start).backbone
        assert all(torch.equal(value, start[name]) for name, value in found.state_dict().items())

    def test_leaves_the_networks_alone(self):
        model = SingleTask(blueprint()).double()
        before = copy.deepcopy(model.state_dict())
        found = merged(model, copy.deepcopy(model.backbones[0].state_dict()))
        scramble(found)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_refuses_what_cannot_be(self):
        model = SingleTask(blueprint())
        state = dict(model.backbones[0].state_dict())
        with pytest.raises(OptionError, match=r"\['0.weight', '9.weight'\] are missing on one side"):
            merged(model, {"9.weight": state.pop("0.weight"), **state})
        with pytest.raises(OptionError, match="another shape"):
            merged(model, {**model.backbones[0].state_dict(), "0.bias": torch.zeros(9)})
        with pytest.raises(OptionError, match="must be finite; found nan"):
            merged(model, model.backbones[0].state_dict(), math.nan)


class TestCrossStitch:
    def by_hand(self, model, inputs):
        states = [inputs] * COUNT
        for stage, unit in zip(model.stages, model.units):
            outputs = [part(state) for part, state in zip(stage, states)]
            states = [sum(unit[i, j].item() * outputs[j] for j in range(COUNT)) for i in range(COUNT)]
        return {task: head(state) for task, head, state in zip(model.tasks, model.heads, states)}

    def test_equals_a_loop(self):
        model = scramble(CrossStitch(blueprint()))
        assert len(model.units) == 2, "one of them in front of the heads"
        for (task, output), other in zip(model(inputs_of(5)).items(), self.by_hand(model, inputs_of(5)).values()):
            torch.testing.assert_close(output, other, msg=task)

    def test_with_identities_is_separate_networks_bit_for_bit(self):
        model = scramble(CrossStitch(blueprint()))
        set_units(model, torch.eye(COUNT))
        networks = [nn.Sequential(*(stage[index] for stage in model.stages)) for index in range(COUNT)]
        for output, network, head in zip(model(inputs_of(5)).values(), networks, model.heads):
            assert torch.equal(output, head(network(inputs_of(5))))

    def test_equal_networks_and_rows_of_sum_one_are_hard_sharing(self):
        model, shared = (
            seeded(lambda name=name: build(name, blueprint()).double()) for name in ("cross_stitch", "hard_sharing")
        )
        matrix = torch.randn(COUNT, COUNT, dtype=torch.float64)
        for units in (model.units[0].detach().clone(), matrix / matrix.sum(1, keepdim=True)):
            set_units(model, units)
            for task, output in shared(inputs_of(5)).items():
                torch.testing.assert_close(model(inputs_of(5))[task], output)

    def test_where_units_begin(self):
        expected = torch.tensor([[0.9, 0.05, 0.05], [0.05, 0.9, 0.05], [0.05, 0.05, 0.9]])
        model = CrossStitch(blueprint())
        for unit in model.units:
            torch.testing.assert_close(unit.detach(), expected)
        assert [unit.tolist() for unit in CrossStitch(blueprint(["alone"])).units] == [[[1.0]]] * 2
        assert len({unit.data_ptr() for unit in model.units}) == 2

    def test_stages(self):
        def names(module):
            return [[type(layer).__name__ for layer in stage] for stage in stages_of(module)]

        assert names(backbone()) == [["Conv2d", "Tanh", "AvgPool2d"], ["Conv2d", "Tanh"]]
        block = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
        nested = nn.Sequential(
            block, nn.Dropout(), ResidualBlock(3, 3, 1), ResidualBlock(3, 3, 1), nn.Flatten(), nn.Linear(3, 3)
        )
        assert names(nested) == [
            ["Conv2d", "BatchNorm2d", "ReLU", "Dropout"],
            ["ResidualBlock"],
            ["ResidualBlock", "Flatten"],
            ["Linear"],
        ]
        same = nn.ReLU()
        assert names(nn.Sequential(nn.Conv2d(2, 3, 1), same, nn.Conv2d(3, 3, 1), same)) == [["Conv2d", "ReLU"]] * 2
        whole = ResidualBlock(2, 2, 1)
        assert stages_of(whole) == [whole]

    def test_a_backbone_that_cannot_be_cut_is_one_stage(self):
        model = scramble(CrossStitch(blueprint(backbone=lambda: ResidualBlock(2, WIDTH, 2))).eval())
        assert len(model.units) == len(model.stages) == 1
        for (task, output), other in zip(model(inputs_of(5)).items(), self.by_hand(model, inputs_of(5)).values()):
            torch.testing.assert_close(output, other, msg=task)

    @pytest.mark.parametrize("own", [-0.1, 1.1, math.nan])
    def test_refuses_what_is_no_share(self, own):
        with pytest.raises(OptionError, match="own must be a share from 0 to 1"):
            CrossStitch(blueprint(), own=own)


class TestSoftSharing:
    def matrices(self, model):
        return [[own[0].weight, own[3].weight] for own in model.backbones]

    def test_penalty_is_the_sum_over_pairs(self):
        model = scramble(SoftSharing(blueprint(), strength=0.7))
        own = self.matrices(model)
        pairs = [(i, j) for i in range(COUNT) for j in range(i + 1, COUNT)]
        expected = sum((own[i][layer] - own[j][layer]).square().sum() for i, j in pairs for layer in range(2))
        torch.testing.assert_close(model.penalty(), 0.7 * expected)

    def test_gradient(self):
        """``2 strength T (W_i - mean)``."""
        model = scramble(SoftSharing(blueprint(), strength=0.7))
        model.penalty().backward()
        own = self.matrices(model)
        for layer in range(2):
            mean = sum(one[layer] for one in own) / COUNT
            for one in own:
                torch.testing.assert_close(one[layer].grad, 2 * 0.7 * COUNT * (one[layer] - mean).detach())
        assert all(one[0].bias.grad is None for one in model.backbones)
        assert all(parameter.grad is None for parameter in model.heads.parameters())

    def test_begins_with_none_and_as_hard_sharing(self):
        model, shared = (
            seeded(lambda name=name: build(name, blueprint()).double()) for name in ("soft_sharing", "hard_sharing")
        )
        assert model.penalty().item() == 0
        assert all(torch.equal(output, model(inputs_of(5))[task]) for task, output in shared(inputs_of(5)).items())

    def test_a_large_penalty_joins_the_weights(self):
        model = scramble(SoftSharing(blueprint(), strength=1.0))
        mean = [sum(one[layer] for one in self.matrices(model)).detach() / COUNT for layer in range(2)]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(60):
            optimizer.zero_grad()
            model.penalty().backward()
            optimizer.step()
        for own in self.matrices(model):
            torch.testing.assert_close(own, mean)

    def test_norms_and_buffers_are_free(self):
        model = SoftSharing(blueprint(backbone=lambda: nn.Sequential(*backbone(), nn.BatchNorm2d(WIDTH))))
        for index, own in enumerate(model.backbones):
            nn.init.constant_(own[-1].weight, index)
            own[-1].running_mean += index
        assert model.penalty().item() == 0

    def test_refuses_what_has_no_effect(self):
        with pytest.raises(OptionError, match="Flatten has none"):
            SoftSharing(blueprint(backbone=nn.Flatten))
        with pytest.raises(OptionError, match="finite number from 0 on; found -1"):
            SoftSharing(blueprint(), strength=-1)


def test_hard_sharing_reads_one_feature():
    model = hard_sharing(blueprint()).double()
    feature = model.backbone(inputs_of(4))
    assert all(torch.equal(output, head(feature)) for output, head in zip(model(inputs_of(4)).values(), model.heads))
