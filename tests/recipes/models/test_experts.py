"""MMoE and PLE against loops over single samples, and where they are other models."""

import math

import pytest
import torch
from torch import nn

from recipes.models.architectures.blueprint import Blueprint
from recipes.models.architectures.experts import Expert, gate_entropy, mean_gates
from recipes.models.architectures.mmoe import MMoE
from recipes.models.architectures.ple import PLE
from recipes.runtime.errors import OptionError

from .parts import OUTPUTS, WIDTH, blueprint, inputs_of, scramble


@pytest.fixture(autouse=True)
def no_grad_by_hand(request):
    """Loops read single numbers; a test of a gradient says so in its name."""
    with torch.set_grad_enabled("gradient" in request.node.name):
        yield


def expert_by_hand(expert, vector):
    layer = expert[0]
    return [
        max(0.0, float(layer.bias[unit]) + sum(float(w) * x for w, x in zip(layer.weight[unit], vector)))
        for unit in range(layer.out_features)
    ]


def gate_by_hand(gate, vector):
    scores = [math.exp(sum(float(w) * x for w, x in zip(row, vector))) for row in gate.weight]
    return [score / sum(scores) for score in scores]


def mix_by_hand(outputs, weights):
    return [sum(weight * output[unit] for weight, output in zip(weights, outputs)) for unit in range(len(outputs[0]))]


def vectors_of(model, inputs):
    return model.vector(model.backbone(inputs)).tolist()


def through_towers(model, states):
    """From ``states[b][t]``."""
    return {
        task: tower(torch.tensor([own[index] for own in states], dtype=torch.float64))
        for index, (task, tower) in enumerate(zip(model.tasks, model.towers))
    }


def ple_by_hand(model, inputs):
    states = []
    for vector in vectors_of(model, inputs):
        own_states, shared_state = [vector] * len(model.tasks), vector
        for number, layer in enumerate(model.layers):
            own = [[expert_by_hand(one, state) for one in experts] for experts, state in zip(layer.own, own_states)]
            shared = [expert_by_hand(one, shared_state) for one in layer.shared]
            after = [
                mix_by_hand(own[task] + shared, gate_by_hand(gate, own_states[task]))
                for task, gate in enumerate(layer.task_gates)
            ]
            if shared and number < len(model.layers) - 1:
                shared_state = mix_by_hand(
                    [output for outputs in own for output in outputs] + shared,
                    gate_by_hand(layer.shared_gate, shared_state),
                )
            own_states = after
        states.append(own_states)
    return through_towers(model, states)


def cgc_by_hand(model, inputs):
    """The first layer alone, as the paper has it before it stacks layers."""
    (layer,) = model.layers
    states = []
    for vector in vectors_of(model, inputs):
        shared = [expert_by_hand(one, vector) for one in layer.shared]
        states.append(
            [
                mix_by_hand([expert_by_hand(one, vector) for one in own] + shared, gate_by_hand(gate, vector))
                for own, gate in zip(layer.own, layer.task_gates)
            ]
        )
    return through_towers(model, states)


def assert_close(one, other):
    assert list(one) == list(other)
    for task in one:
        torch.testing.assert_close(one[task], other[task], rtol=1e-10, atol=1e-12)


class TestMMoE:
    def test_equals_a_loop_over_samples(self):
        model = scramble(MMoE(blueprint(), experts=3, expert_width=4))
        inputs = inputs_of(5)
        states = []
        for vector in vectors_of(model, inputs):
            outputs = [expert_by_hand(expert, vector) for expert in model.experts]
            states.append([mix_by_hand(outputs, gate_by_hand(gate, vector)) for gate in model.task_gates])
        assert_close(model(inputs), through_towers(model, states))

    def test_one_expert_is_a_shared_bottom_bit_for_bit(self):
        model = scramble(MMoE(blueprint(), experts=1))
        inputs = inputs_of(6)
        shared = model.experts[0](model.vector(model.backbone(inputs)))
        for (task, output), tower in zip(model(inputs).items(), model.towers):
            assert torch.equal(output, tower(shared)), task

    def test_begins_as_the_mean_of_experts_that_differ(self):
        model = MMoE(blueprint(), experts=4, expert_width=5).double()
        inputs = inputs_of(6)
        experts = [expert(model.vector(model.backbone(inputs))) for expert in model.experts]
        assert not any(torch.equal(experts[0], other) for other in experts[1:])
        for (task, output), tower in zip(model(inputs).items(), model.towers):
            torch.testing.assert_close(output, tower(sum(experts) / 4), msg=task)

    def test_gradient_of_a_gate(self):
        """``d z / d logits = g (e - z)``."""
        model = scramble(MMoE(blueprint(), experts=3, expert_width=4))
        vector = model.vector(model.backbone(inputs_of(1))).detach()
        experts = torch.stack([expert(vector)[0] for expert in model.experts]).detach()
        logits = nn.functional.linear(vector, model.task_gates[0].weight)[0].detach()
        found = torch.autograd.functional.jacobian(lambda own: own.softmax(0) @ experts, logits)
        gates = model.task_gates[0](vector)[0]
        torch.testing.assert_close(found, (gates[:, None] * (experts - gates @ experts)).T)
        weight = model.task_gates[0].weight
        torch.stack([(gates @ experts).sum()]).backward()
        torch.testing.assert_close(weight.grad, found.sum(0)[:, None] * vector)

    def test_gates_for_logs(self):
        model = scramble(MMoE(blueprint(), experts=3))
        inputs = inputs_of(7)
        gates = model.gates(inputs)
        expected = [[gate_by_hand(gate, vector) for gate in model.task_gates] for vector in vectors_of(model, inputs)]
        torch.testing.assert_close(gates, torch.tensor(expected, dtype=torch.float64))
        torch.testing.assert_close(mean_gates(gates).sum(1), torch.ones(len(OUTPUTS), dtype=torch.float64))
        entropy = [
            sum(-weight * math.log(weight) for own in expected for weight in own[task]) / 7 / math.log(3)
            for task in range(len(OUTPUTS))
        ]
        torch.testing.assert_close(gate_entropy(gates), torch.tensor(entropy, dtype=torch.float64))
        assert gate_entropy(torch.tensor([[[1.0, 0.0]]])).item() == 0
        assert gate_entropy(torch.full((2, 1, 4), 0.25)).item() == pytest.approx(1)
        assert gate_entropy(torch.ones(2, 3, 1)).tolist() == [1, 1, 1]

    def test_default_experts_are_together_as_wide_as_the_feature_but_not_narrow(self):
        def width(feature, experts):
            own = blueprint()
            parts = Blueprint(own.tasks, own.backbone, own.head, feature, own.tower, own.vector)
            return MMoE(parts, experts=experts).experts[0][0].out_features

        assert [width(512, 8), width(512, 40), width(20, 8), width(33, 1)] == [64, 32, 20, 33]


def test_experts_keep_the_size_of_signals():
    vectors = torch.randn(400, 300, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    for width, outputs in ((300, 80), (80, 50)):
        vectors = Expert(width, outputs)(vectors)
        assert 0.6 < vectors.square().mean() < 1.6


class TestPLE:
    @pytest.mark.parametrize(
        ("layers", "own", "shared"), [(1, 1, 1), (2, 1, 1), (3, 2, 1), (2, 1, 2), (2, 0, 2), (2, 2, 0)]
    )
    def test_equals_a_loop_over_samples(self, layers, own, shared):
        model = scramble(PLE(blueprint(), layers=layers, own=own, shared=shared, expert_width=4))
        inputs = inputs_of(4)
        assert_close(model(inputs), ple_by_hand(model, inputs))

    def test_one_layer_is_cgc(self):
        model = scramble(PLE(blueprint(), layers=1, own=2, shared=3))
        assert_close(model(inputs_of(5)), cgc_by_hand(model, inputs_of(5)))

    def test_one_shared_expert_alone_is_hard_sharing(self):
        model = scramble(PLE(blueprint(), layers=1, own=0, shared=1))
        inputs = inputs_of(5)
        shared = model.layers[0].shared[0](model.vector(model.backbone(inputs)))
        for (task, output), tower in zip(model(inputs).items(), model.towers):
            assert torch.equal(output, tower(shared)), task

    @pytest.mark.parametrize("layers", [1, 2])
    def test_one_own_expert_alone_is_a_tower_of_each_task(self, layers):
        model = scramble(PLE(blueprint(), layers=layers, own=1, shared=0))
        inputs = inputs_of(5)
        outputs = model(inputs)
        for index, (task, tower) in enumerate(zip(model.tasks, model.towers)):
            state = model.vector(model.backbone(inputs))
            for layer in model.layers:
                state = layer.own[index][0](state)
            assert torch.equal(outputs[task], tower(state)), task

    def test_begins_with_equal_weights(self):
        model = PLE(blueprint())
        assert all(not gate.any() for gate in model.mixing_parameters())
        assert len(model.mixing_parameters()) == 2 * len(OUTPUTS) + 1, "the last layer has no gate of the shared state"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MMoE(blueprint(), experts=0), "experts must be a whole number from 1 on; found 0"),
        (lambda: MMoE(blueprint(), experts=2.0), "experts must be a whole number from 1 on; found 2.0"),
        (lambda: MMoE(blueprint(), expert_width=0), "expert_width must be a whole number from 1 on; found 0"),
        (lambda: PLE(blueprint(), layers=0), "layers must be a whole number from 1 on; found 0"),
        (lambda: PLE(blueprint(), own=-1), "own must be a whole number from 0 on; found -1"),
        (lambda: PLE(blueprint(), own=0, shared=0), "own or shared must be 1 or more; found 0 of both"),
    ],
)
def test_what_cannot_be_built(make, message):
    with pytest.raises(OptionError, match=message):
        make()


def test_blueprint_has_the_width_of_its_vectors():
    assert len(vectors_of(MMoE(blueprint()).double(), inputs_of(1))[0]) == WIDTH
