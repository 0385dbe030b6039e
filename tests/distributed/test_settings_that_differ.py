"""Processes whose settings, states or groups differ: the right numbers or an error on all of them, never a hang."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from saliency_reg import FeatureSurgery, ParameterSurgery, RelationWeights, SaliencyRegularizer
from tests.support.two_processes import run_on_two_processes
from tests.support.zoo import TASKS, build

from .support import build_model, error_of, one_call, quiet, share


def with_settings(rank: int, settings: list[dict[str, Any]]) -> tuple[str, str]:
    options = dict(settings[rank])
    tasks = options.pop("tasks", TASKS)
    if isinstance(options.get("relations"), dict):
        options["relations"] = RelationWeights(3, **options["relations"])
    model = build_model()
    regularizer = SaliencyRegularizer(
        model, {task: f"heads.{task}" for task in tasks}, **{"strength": 0.1, "metric": "l1", **options}
    )
    return error_of(lambda: one_call(model, regularizer, share(rank)))


class TestSettings:
    @pytest.mark.parametrize(
        ("ours", "theirs", "kind", "words"),
        [
            (
                {"feature": "backbone", "channel_axis": [None]},
                {"feature": "backbone", "channel_axis": [1]},
                "ConfigurationError",
                "different channel_axis: (None,) on rank 0, (1,) on rank 1",
            ),
            (
                {"strength": 0.1},
                {"strength": 0.2},
                "ConfigurationError",
                "different strength: 0.1 on rank 0, 0.2 on rank 1",
            ),
            ({}, {"tasks": TASKS[::-1]}, "TaskError", "different tasks: ('first', 'second', 'third') on rank 0"),
            ({}, {"tasks": TASKS[:2]}, "TaskError", "different tasks"),
            ({}, {"relations": "projected"}, "ConfigurationError", "different relations"),
            ({}, {"relations": {"temperature": 0.5}}, "ConfigurationError", "temperature=0.5"),
            ({}, {"metric": "cosine"}, "ConfigurationError", "different metric: 'l1' on rank 0"),
            ({}, {"pool": "mean"}, "ConfigurationError", "different pool"),
            ({}, {"loss_reduction": "sum"}, "ConfigurationError", "different loss_reduction"),
            ({}, {"feature": "backbone.0"}, "ConfigurationError", "different heads and feature"),
            ({}, {"check_finite": True}, "ConfigurationError", "different check_finite"),
            ({}, {"max_tasks_per_step": 2}, "ConfigurationError", "different max_tasks_per_step"),
            ({"max_tasks_per_step": 2}, {"max_tasks_per_step": 2, "seed": 1}, "ConfigurationError", "different seed"),
            ({}, {"warmup_steps": 5}, "ConfigurationError", "different warmup_steps"),
            (
                {"relations": {"rule": "fixed", "matrix": torch.ones(3, 3) - torch.eye(3)}},
                {"relations": {"rule": "fixed", "matrix": torch.tensor([[0.0, 2, 1], [2, 0, 1], [1, 1, 0]])}},
                "ConfigurationError",
                "different relation weights",
            ),
        ],
    )
    def test_are_refused_on_all_processes(self, ours: Any, theirs: Any, kind: str, words: str) -> None:
        for found, text in run_on_two_processes(with_settings, [ours, theirs]):
            assert (found, words in text) == (kind, True), text
            assert "process_group='local'" in text

    def test_changed_later_on_one_process(self) -> None:
        for found, text in run_on_two_processes(change_later):
            assert found == "ConfigurationError"
            assert "different strength" in text

    def test_relations_that_differ_later(self) -> None:
        """With every call: gradients would be those of no objective. Other kinds of processors may round otherwise."""
        for found, text in run_on_two_processes(other_relations_later, 1e-6):
            assert found == "ConfigurationError"
            assert "different relation weights" in text
        for found, text in run_on_two_processes(other_relations_later, 1e-15):
            assert found == "no error", text

    def test_state_loaded_on_one_process_only(self) -> None:
        for found, text in run_on_two_processes(load_on_one):
            assert found == "ConfigurationError"
            assert "different optimizer steps so far: 3 on rank 0, 0 on rank 1" in text


def other_relations_later(rank: int, difference: float) -> tuple[str, str]:
    model = build_model()
    relations = RelationWeights(3, "fixed")
    regularizer = SaliencyRegularizer(model, "heads", strength=0.1, relations=relations, metric="l1")
    one_call(model, regularizer, share(rank)).backward()
    if rank:
        relations.pair_weights[0] += difference
    return error_of(lambda: one_call(model, regularizer, share(rank)))


def change_later(rank: int) -> tuple[str, str]:
    model = build_model()
    regularizer = SaliencyRegularizer(model, "heads", strength=0.1, metric="l1")
    one_call(model, regularizer, share(rank)).backward()
    regularizer.strength = 0.1 + rank
    return error_of(lambda: one_call(model, regularizer, share(rank)))


def load_on_one(rank: int) -> tuple[str, str]:
    model = build_model()
    regularizer = SaliencyRegularizer(model, "heads", strength=0.1, metric="l1")
    for _ in range(3):
        regularizer.step()
    state = regularizer.state_dict()
    regularizer.remove()
    regularizer = SaliencyRegularizer(model, "heads", strength=0.1, metric="l1")
    if rank == 0:
        regularizer.load_state_dict(state)
    return error_of(lambda: one_call(model, regularizer, share(rank)))


class TestProcessGroups:
    def test_local_trains_alone(self) -> None:
        first, second = run_on_two_processes(relations_of_group, "local")
        assert not torch.equal(first, second)

    def test_own_groups_of_the_wrapped_model(self) -> None:
        first, second = run_on_two_processes(relations_of_group, "one each")
        assert not torch.equal(first, second)

    def test_a_copy_does_not_take_it_along(self) -> None:
        for found, text in run_on_two_processes(copied_with_group):
            assert found == "ConfigurationError"
            assert "cannot be copied" in text

    def test_of_other_processes(self) -> None:
        first, second = run_on_two_processes(group_of_the_first)
        assert first == ("no error", "")
        assert second[0] == "ConfigurationError"
        assert "not a member" in second[1]

    def test_a_given_group(self) -> None:
        first, second = run_on_two_processes(relations_of_group, "given")
        assert torch.equal(first, second)

    @pytest.mark.parametrize(("group", "kind"), [("all", "ConfigurationError"), (3, "WrongTypeError")])
    def test_bad_ones(self, group: Any, kind: str) -> None:
        model = build_model()
        for attach in (SaliencyRegularizer, FeatureSurgery):
            found, text = error_of(lambda attach=attach: attach(model, "heads", process_group=group))
            assert found == kind
            assert "process_group" in text
        assert error_of(lambda: ParameterSurgery(model, process_group=group))[0] == kind


def copied_with_group(rank: int) -> tuple[str, str]:
    group = dist.new_group([0, 1])
    regularizer = SaliencyRegularizer(None, tasks=["a", "b"], process_group=group, strength=0.1, metric="l1")
    feature = torch.ones(4, 2, requires_grad=True)
    outputs = {"a": feature.sum(1), "b": 3 * feature.sum(1)}
    copied = copy.deepcopy(regularizer)
    return error_of(lambda: copied(outputs=outputs, features=feature))


def group_of_the_first(rank: int) -> tuple[str, str]:
    group = dist.new_group([0])
    return error_of(lambda: SaliencyRegularizer(build_model(), "heads", process_group=group, strength=0.1, metric="l1"))


def relations_of_group(rank: int, what: str) -> Tensor:
    quiet()
    model: nn.Module = build_model()
    group: Any = None
    if what == "one each":
        groups = [dist.new_group([other]) for other in range(2)]
        model = DistributedDataParallel(model, process_group=groups[rank])
    elif what == "given":
        group = dist.new_group([0, 1])
    else:
        group = what
    regularizer = SaliencyRegularizer(model, "heads", strength=0.1, process_group=group, metric="l1")
    for _ in range(1 + rank if what == "one each" else 1):  # nobody waits for the other
        one_call(model, regularizer, share(rank)).backward()
    regularizer.step()
    return regularizer.relations.matrix()


def penalty_of(rank: int, process_group: str | None) -> float:
    entry = build("tanh heads")
    regularizer = SaliencyRegularizer(entry.model, "heads", process_group=process_group, strength=0.1, metric="l1")
    entry.model(entry.inputs[: 2 + rank])
    return regularizer().item()


def test_local_is_what_a_process_has_outside_of_distributed_runs() -> None:
    alone = [penalty_of(rank, None) for rank in range(2)]
    assert run_on_two_processes(penalty_of, "local") == pytest.approx(alone, rel=1e-14)
    assert run_on_two_processes(penalty_of, None) != pytest.approx(alone, rel=1e-3)
