"""A Trainer that was stopped, killed, or is given the checkpoint of another."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer

from saliency_reg import PCGrad, SaliencyRegularizer
from saliency_reg.errors import StateMismatchError
from saliency_reg.integrations.transformers import (
    SaliencyLoss,
    SaliencyTrainer,
    UnsupportedTrainerError,
    saliency_regularizer,
)
from tests.support.paths import ROOT

from .support import TASKS, arguments, classifier, difference, rows

#: Of names that older scripts use.
pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")


def test_resumed_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    def run(folder: Path, **options: Any) -> tuple[nn.Module, SaliencyRegularizer]:
        model = classifier(hidden_dropout_prob=0.1)
        regularizer = saliency_regularizer(model, TASKS, strength=0.5, surgery=PCGrad(), metric="l1")
        settings = arguments(folder, save_strategy="steps", save_steps=2, **options.pop("settings", {}))
        trainer = SaliencyTrainer(model, settings, train_dataset=rows(), regularizer=regularizer)
        trainer.train(**options)
        return model, regularizer

    whole, expected = run(tmp_path / "whole")
    model, regularizer = run(tmp_path / "whole", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert difference(model, whole) == 0
    assert all(torch.equal(one, other) for one, other in zip(regularizer.buffers(), expected.buffers()))
    assert int(regularizer.steps) == 6


#: A training in a process of its own, which is killed in the middle of its fourth step.
SCRIPT = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import torch, transformers
from tests.integrations.transformers.trainer.support import TASKS, arguments, classifier, rows
from saliency_reg.integrations.transformers import SaliencyLoss, saliency_regularizer

class Kill(transformers.TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **_):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

folder, what = Path(sys.argv[1]), sys.argv[2]
model = classifier(hidden_dropout_prob=0.1)
regularizer = saliency_regularizer(model, TASKS, strength=0.5)
saliency = SaliencyLoss(regularizer)
callbacks = [saliency, Kill()] if what == "kill" else [saliency]
options = arguments(folder, save_strategy="steps", save_steps=1)
trainer = transformers.Trainer(model, options, train_dataset=rows(), compute_loss_func=saliency, callbacks=callbacks)
trainer.train(resume_from_checkpoint=what == "resume" or None)
torch.save([model.state_dict(), regularizer.state_dict()], folder / "end.pt")
"""


def test_killed_and_resumed(tmp_path: Path) -> None:

    def start(folder: str, what: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / folder), what, str(ROOT)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    assert start("killed", "kill").returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "end.pt").exists()
    for folder, what in (("killed", "resume"), ("whole", "run")):
        done = start(folder, what)
        assert done.returncode == 0, done.stderr
    killed, whole = (torch.load(tmp_path / folder / "end.pt") for folder in ("killed", "whole"))
    for one, other in zip(killed, whole):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_of_the_other_way_is_taken(tmp_path: Path) -> None:
    model = classifier()
    regularizer = saliency_regularizer(model, TASKS, strength=0.1, metric="l1")
    options = arguments(tmp_path, save_strategy="steps", save_steps=3, max_steps=3)
    SaliencyTrainer(model, options, train_dataset=rows(), regularizer=regularizer).train()
    other = classifier()
    again = saliency_regularizer(other, TASKS, strength=0.1, metric="l1")
    saliency = SaliencyLoss(again)
    more = arguments(tmp_path, save_strategy="steps", save_steps=1, max_steps=4)
    trainer = Trainer(other, more, train_dataset=rows(), compute_loss_func=saliency, callbacks=[saliency])
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert int(again.steps) == 4
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert [name for name in state["stateful_callbacks"] if "Saliency" in name] == ["SaliencyLoss"]


def test_a_checkpoint_without_our_state_is_refused(tmp_path: Path) -> None:
    plain = classifier()
    Trainer(plain, arguments(tmp_path, save_strategy="steps", save_steps=2), train_dataset=rows()).train()
    model = classifier()
    regularizer = saliency_regularizer(model, TASKS, strength=0.1, metric="l1")
    trainer = SaliencyTrainer(model, arguments(tmp_path), train_dataset=rows(), regularizer=regularizer)
    with pytest.raises(UnsupportedTrainerError, match="no state of a SaliencyRegularizer"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_the_state_of_other_tasks_is_refused(tmp_path: Path) -> None:
    model = classifier()
    options = arguments(tmp_path, save_strategy="steps", save_steps=2)
    SaliencyTrainer(
        model, options, train_dataset=rows(), regularizer=saliency_regularizer(model, TASKS, strength=0.1, metric="l1")
    ).train()
    other = classifier()
    regularizer = saliency_regularizer(other, ["x", "y", "z"], strength=0.1, metric="l1")
    trainer = SaliencyTrainer(other, options, train_dataset=rows(), regularizer=regularizer)
    with pytest.raises(StateMismatchError):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_rebuilt_callbacks_are_refused(tmp_path: Path) -> None:
    model = classifier()
    options = arguments(tmp_path, save_strategy="steps", save_steps=2, restore_callback_states_from_checkpoint=True)
    SaliencyTrainer(
        model, options, train_dataset=rows(), regularizer=saliency_regularizer(model, TASKS, strength=0.1, metric="l1")
    ).train()
    other = classifier()
    trainer = SaliencyTrainer(
        other, options, train_dataset=rows(), regularizer=saliency_regularizer(other, TASKS, strength=0.1, metric="l1")
    )
    with pytest.raises(UnsupportedTrainerError, match="restore_callback_states_from_checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
