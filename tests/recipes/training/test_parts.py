"""What the training loop of the recipes is made of: batches, options, random numbers."""

import math

import numpy as np
import pytest
import torch

from recipes.data.sources import Examples
from recipes.runtime.errors import OptionError
from recipes.runtime.processes import open_accelerator
from recipes.runtime.random_state import derived_seed, kept_random_state, load_random_state, random_state
from recipes.training.batches import Feed, GlobalBatches, MicroBatch
from recipes.training.learning_rate import learning_rate_factor
from recipes.training.options import Options

from ..support.small_training import Samples, Training, same

#: Batches of 5, 5 and 1 of 11 samples: with two processes one of them has none in the last step.
UNEVEN = {"samples": 11, "epochs": 3, "batch_size": 5}
TOLERANCE = 1e-10


class TestBatches:
    @pytest.mark.parametrize("samples", [1, 7, 23])
    @pytest.mark.parametrize("ranks", [1, 2, 3])
    @pytest.mark.parametrize("accumulation", [1, 2, 4])
    def test_processes_and_micro_batches_divide_the_same_batches(self, samples, ranks, accumulation):
        whole = GlobalBatches(samples, 5, seed=3).steps(2)
        parts = [
            GlobalBatches(samples, 5, seed=3, accumulation=accumulation, ranks=ranks, rank=rank).steps(2)
            for rank in range(ranks)
        ]
        for index, step in enumerate(whole):
            mine = [own[index] for own in parts]
            joined = [row for own in mine for micro in own.own for row in micro.indices]
            assert joined == list(step.own[0].indices)
            assert len({len(own.own) for own in mine}) == 1, "every process has as many backward passes"
            assert all(own.size == step.size == sum(own.sizes) for own in mine)
            sizes = [sum(len(micro.indices) for micro in own.own) for own in mine]
            assert max(sizes) - min(sizes) <= 1
            assert mine[0].sizes == tuple(
                sum(len(own.own[micro].indices) for own in mine) for micro in range(len(mine[0].own))
            )

    def test_order_depends_on_seed_and_epoch(self):
        orders = [tuple(GlobalBatches(20, 5, seed=seed).order(epoch)) for seed in (0, 1) for epoch in (0, 1)]
        assert len(set(orders)) == 4
        assert orders[0] == tuple(GlobalBatches(20, 7, seed=0).order(0))
        assert all(sorted(order) == list(range(20)) for order in orders)

    def test_what_is_drawn_for_a_sample_depends_on_its_epoch_and_index(self):
        feed = Feed(Samples(6, noise=1.0), seed=1)
        before = random_state()
        (one,), (other,), (later,) = (
            list(feed([MicroBatch(epoch, rows)])) for epoch, rows in ((0, [4, 2]), (0, [1, 2, 3]), (1, [4, 2]))
        )
        assert torch.equal(one["inputs"][1], other["inputs"][1])
        assert not torch.equal(one["inputs"], later["inputs"])
        assert same(before["python"], random_state()["python"])
        assert torch.equal(before["torch"], random_state()["torch"])
        assert torch.equal(before["numpy"][1], random_state()["numpy"][1])

    def test_empty_batches_have_the_format_of_others(self):
        (batch,) = Feed(Samples(6), seed=1)([MicroBatch(0, [])])
        assert batch["inputs"].shape == (0, 6)
        assert batch["id"].shape == (0,)
        examples = Examples(torch.zeros(4, 1, 8, 8), torch.zeros(4, 3), (0, 1, 2, 3))
        ((inputs, labels),) = Feed(examples, seed=1)([MicroBatch(0, [])])
        assert inputs.shape == (0, 1, 8, 8)
        assert labels.shape == (0, 3)


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"epochs": 0}, "epochs must be a whole number from 1 on; found 0"),
            ({"batch_size": 2.5}, "batch_size must be a whole number from 1 on; found 2.5"),
            ({"accumulation": True}, "accumulation must be a whole number"),
            ({"data_workers": -1}, "data_workers must be a whole number from 0 on"),
            ({"clip_norm": 0.0}, "clip_norm must be a finite number above 0"),
            ({"decay": "step"}, "Use one of constant, cosine, linear"),
        ],
    )
    def test_bad_ones_say_what_to_pass(self, options, message):
        with pytest.raises(OptionError, match=message):
            Options(**{"epochs": 1, "batch_size": 1, **options})

    def test_bad_precisions_say_what_to_type(self):
        with pytest.raises(OptionError, match="Use one of no, bf16, fp16"):
            open_accelerator("fp8")
        if not torch.cuda.is_available():
            with pytest.raises(OptionError, match="fp16 needs a GPU"):
                open_accelerator("fp16")
        open_accelerator("no")
        with pytest.raises(OptionError, match="another precision"):
            open_accelerator("bf16")

    def test_no_data(self):
        with pytest.raises(OptionError, match="no training samples"):
            Training(samples=0)

    def test_learning_rate(self):
        factors = [learning_rate_factor(decay, 2, 6) for decay in ("constant", "linear", "cosine")]
        assert [[factor(step) for step in range(7)] for factor in factors] == [
            pytest.approx(values)
            for values in (
                [0.5, 1, 1, 1, 1, 1, 1],
                [0.5, 1, 1, 0.75, 0.5, 0.25, 0],
                [0.5, 1, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0],
            )
        ]
        with pytest.raises(OptionError, match="Pass a number from 0 to 5"):
            learning_rate_factor("linear", 6, 6)


class TestRandomState:
    def test_goes_on_where_it_was_taken(self):
        def draw():
            return torch.rand(3).tolist(), np.random.rand(3).tolist()  # noqa: NPY002

        with kept_random_state():
            state = random_state()
            first = draw()
            load_random_state(state)
            assert draw() == first

    def test_derived_seeds_differ(self):
        seeds = {derived_seed(seed, epoch, index) for seed in range(3) for epoch in range(20) for index in range(100)}
        assert len(seeds) == 6000
        assert all(0 <= seed < 2**63 for seed in seeds)
