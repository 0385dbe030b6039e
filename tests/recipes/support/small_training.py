"""A small multi-task problem on the engine, for tests that start, kill and resume trainings in processes of their own."""

import multiprocessing
import os
import random
import resource
import signal
from pathlib import Path

import numpy as np
import torch
from torch import nn

from recipes.methods.backward import Backward
from recipes.methods.surgeries import PCGRAD, PCGRAD_PARAMETERS
from recipes.runtime.processes import open_accelerator
from recipes.runtime.termination import Terminated, listen
from recipes.training.best_weights import BestWeights
from recipes.training.engine import Engine
from recipes.training.objective import Objective
from recipes.training.options import Options
from saliency_reg import SaliencyRegularizer

TASKS = ("a", "b", "c")
#: Name to the kind of surgery, and whether there is a regularizer.
METHODS = {
    "plain": (None, False),
    "regularizer": (None, True),
    "feature": (PCGRAD, False),
    "parameters": (PCGRAD_PARAMETERS, False),
    "regularizer and feature": (PCGRAD, True),
    "regularizer and parameters": (PCGRAD_PARAMETERS, True),
}


def forkserver():
    """Processes that have imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.recipes.support.small_training", "accelerate.accelerator", "torch.distributed.fsdp"]
    )
    return context


def as_rank(rank):
    """What torchrun tells a process."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")


class Net(nn.Module):
    def __init__(self, tasks, dropout, width):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Linear(6, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, 8), nn.Tanh()
        )
        self.heads = nn.ModuleDict({task: nn.Sequential(nn.Linear(8, 4), nn.GELU(), nn.Linear(4, 1)) for task in tasks})

    def forward(self, inputs):
        feature = self.backbone(inputs)
        return {task: head(feature).squeeze(1) for task, head in self.heads.items()}


class Samples:
    """Rows with missing labels, and noise from all three generators that a dataset may draw from."""

    def __init__(self, count, tasks=TASKS, noise=0.0, dtype=torch.float64):
        generator = torch.Generator().manual_seed(count)
        self.inputs = torch.randn(count, 6, generator=generator, dtype=torch.float64).to(dtype)
        weights = torch.randn(6, len(tasks), generator=generator, dtype=torch.float64).to(dtype)
        self.labels = (self.inputs @ weights).tanh()
        self.known = torch.rand(count, len(tasks), generator=generator) < 0.6
        self.noise = noise

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        drawn = torch.randn(6).sum() + float(np.random.rand()) + random.random()  # noqa: NPY002
        return {
            "id": index,
            "inputs": self.inputs[index] + self.noise * drawn,
            "labels": self.labels[index],
            "known": self.known[index],
        }


class Regression(Objective):
    def __init__(self, tasks, apart):
        self.tasks = tuple(tasks)
        self.apart = apart

    def losses(self, model, batch):
        outputs = list(model(batch["inputs"]).values())
        errors = [(own - truth).square() for own, truth in zip(outputs, batch["labels"].unbind(1))]
        return errors if self.apart else torch.stack(errors)

    def weights(self, batch):
        return batch["known"].T

    def regularizer_arguments(self, batch, losses):
        stacked = (losses if isinstance(losses, torch.Tensor) else torch.stack(list(losses))).detach()
        return {"losses": (stacked * batch["known"].T).sum() / max(len(batch["known"]), 1)}

    def predictions(self, model, batch):
        return {"outputs": torch.stack(list(model(batch["inputs"]).values()), 1), **batch}


class Training:
    """A whole training; ``run`` ends with the best weights."""

    def __init__(
        self,
        folder=None,
        method="regularizer and feature",
        samples=12,
        tasks=TASKS,
        noise=0.0,
        dropout=0.0,
        width=8,
        dtype=torch.float64,
        strength=0.5,
        precision="no",
        trackers=(),
        after_epoch=None,
        figures=None,
        scale=None,
        model=None,
        **plan,
    ):
        torch.manual_seed(0)
        self.model = Net(tasks, dropout, width).to(dtype) if model is None else model
        optimizer = torch.optim.AdamW(
            [
                {"params": self.model.backbone.parameters(), "lr": 0.01},
                {"params": self.model.heads.parameters(), "lr": 0.03},
            ]
        )
        accelerator = open_accelerator(precision, trackers=trackers, folder=folder)
        if scale is not None:
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        surgery, with_penalty = METHODS[method]
        self.backward = Backward(
            self.model,
            "heads",
            tasks,
            optimizer,
            surgery,
            (
                lambda own: SaliencyRegularizer(
                    self.model, "heads", strength=strength, optimizer=optimizer, surgery=own, metric="l1"
                )
            )
            if with_penalty
            else None,
            seed=3,
        )
        self.best = BestWeights([self.model], (-float("inf"),))
        self.validation = Samples(7, tasks, dtype=dtype)
        self.engine = Engine(
            accelerator,
            self.model,
            optimizer,
            self.backward,
            Regression(tasks, self.backward.averages_itself),
            Samples(samples, tasks, noise, dtype),
            Options(**{"epochs": 2, "batch_size": 5, "decay": "constant", "evaluation_batch_size": 3, **plan}),
            folder=folder,
            stateful={"best": self.best},
            tracked=("small", {"seed": 0}) if trackers else None,
        )
        self._after_epoch = after_epoch
        self._figures = figures or {}

    def validate(self, epoch, losses):
        found = self.engine.evaluate(self.validation)
        error = float(((found["outputs"] - found["labels"]).square() * found["known"]).mean())
        self.best.update(epoch, [(-error,)])
        if self._after_epoch is not None:
            self._after_epoch(self, epoch)
        return {"validation_error": error, **self._figures}

    def run(self, resume="never"):
        self.engine.run(self.validate, resume)
        return self.outcome()

    def outcome(self):
        return {
            "model": {name: value.clone() for name, value in self.model.state_dict().items()},
            "best": self.best.state_dict(),
            "relations": self.backward.relations,
        }


def run_in_process(folder, options, resume, limit=None, own_group=False):
    """The body of a process of :func:`forkserver`: train, and leave ``outcome.pt``."""
    if own_group:
        os.setpgid(0, 0)
    torch.set_num_threads(1)
    listen()
    if limit is not None:

        def restrict(training, epoch):
            if epoch == limit["epoch"]:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit["bytes"], limit["bytes"]))

        options = {**options, "after_epoch": restrict}
    try:
        outcome = Training(Path(folder), **options).run(resume)
    except Terminated as stop:
        (Path(folder) / "message").write_text(stop.message)
        raise
    temporary = Path(folder) / ".outcome.pt"
    torch.save(outcome, temporary)
    os.replace(temporary, Path(folder) / "outcome.pt")


def start(folder, options, resume="auto", limit=None, own_group=False):
    process = forkserver().Process(target=run_in_process, args=(str(folder), options, resume, limit, own_group))
    process.start()
    return process


def finish(process, seconds=60):
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError("the training did not end in time")
    return process.exitcode


def outcome_of(folder):
    return torch.load(Path(folder) / "outcome.pt", weights_only=False)


def same(one, other):
    """To the bit, through dictionaries and lists."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def killed(process):
    return process.exitcode == -signal.SIGKILL
