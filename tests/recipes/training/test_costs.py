"""What a training costs: bytes that are alive, counted by hand."""

import time

import torch
from torch import nn

from recipes.training.costs import LiveBytes, clock, live_bytes

CPU = torch.device("cpu")
#: Bytes of a matrix of the tests.
MATRIX = 4 * 100 * 100


class TestLiveBytes:
    def test_of_what_is_kept_and_of_what_was_freed(self):
        given = torch.zeros(100, 100)
        with LiveBytes([given, given.T]) as counted:
            assert counted.now == MATRIX, "a view is no memory"
            once = given + 1
            assert counted.now == 2 * MATRIX
            del once
            assert counted.now == MATRIX
            view = (given * 2).T[1:]
            assert counted.now == 2 * MATRIX
            del view
            given.add_(1)
        assert (counted.now, counted.peak) == (MATRIX, 2 * MATRIX)

    def test_of_a_training_step(self):
        """Weights, their gradients and moments, and the activations that wait for the backward pass."""
        model = nn.Sequential(*(nn.Sequential(nn.Linear(100, 100, bias=False), nn.Tanh()) for _ in range(4)))
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
        inputs = torch.randn(100, 100)
        with LiveBytes(model.parameters()) as counted:
            assert counted.now == 4 * MATRIX
            loss = model(inputs).sum()
            assert counted.now == 8 * MATRIX + 4, "of each layer what tanh returned"
            loss.backward()
            assert counted.now == 8 * MATRIX + 4, "gradients, in place of activations"
            optimizer.step()
            optimizer.zero_grad()
            del loss
            assert counted.now == 8 * MATRIX, "momentum, in place of gradients"
        assert counted.peak >= 8 * MATRIX

    def test_of_the_same_step_it_is_the_same(self):
        def peak():
            weight = torch.randn(50, 50, requires_grad=True)
            with live_bytes(CPU, [weight]) as counted:
                (weight @ weight).tanh().sum().backward()
            return counted.peak

        assert peak() == peak()


def test_the_clock_is_that_of_the_processor():
    started = clock(CPU)
    time.sleep(0.3)
    assert clock(CPU) - started < 0.2
