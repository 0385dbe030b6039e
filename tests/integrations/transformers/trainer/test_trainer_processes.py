"""A Trainer in two processes against the same training in one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from saliency_reg import PCGrad
from saliency_reg.integrations.transformers import (
    HeadConfig,
    MultiTaskCollator,
    MultiTaskModel,
    SaliencyLoss,
    SaliencyTrainer,
    saliency_regularizer,
)
from tests.support.paths import ROOT

from .support import TASKS, InOrder, Padding, arguments, classifier, config, rows

#: Of names that older scripts use.
pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")

#: Each step is as many rows in one process as in two.
ROWS = 40


class Ordered(InOrder, SaliencyTrainer):
    pass


class Plain(InOrder, Trainer):
    pass


def trained(way: str, folder: Path, batch_size: int) -> list[dict[str, Any]]:
    if way == "checkpointed":
        return trained_with_heads(folder, batch_size)
    model = classifier()
    regularizer = saliency_regularizer(model, TASKS, strength=0.5, surgery=PCGrad(), metric="l1")
    options: dict[str, Any] = {
        "model": model,
        "args": arguments(
            folder,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=2,
            ddp_find_unused_parameters=False,
        ),
        "train_dataset": rows()[:ROWS],
    }
    if way == "trainer":
        Ordered(regularizer=regularizer, **options).train()
    else:
        saliency = SaliencyLoss(regularizer)
        Plain(compute_loss_func=saliency, callbacks=[saliency], **options).train()
    return [model.state_dict(), regularizer.state_dict()]


def trained_with_heads(folder: Path, batch_size: int) -> list[dict[str, Any]]:
    """A multi-task model whose encoder has a pooler that nothing reads, with activation checkpointing."""
    torch.manual_seed(0)
    model = MultiTaskModel.from_encoder(config(), {"joy": 1, "topic": 4}, head=HeadConfig(hidden=(6,), dropout=0.0))
    model = model.double()
    regularizer = model.regularizer(strength=0.5, metric="l1")
    data = [{**row, "labels": {"joy": float(row["labels"][0]), "topic": int(row["labels"].sum())}} for row in rows()]
    options = arguments(
        folder,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    Ordered(
        model,
        options,
        train_dataset=data[:ROWS],
        data_collator=MultiTaskCollator(model, Padding()),
        regularizer=regularizer,
    ).train()
    return [model.state_dict(), regularizer.state_dict()]


SCRIPT = """
import os, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import torch
from tests.integrations.transformers.trainer.test_trainer_processes import trained
folder = Path(sys.argv[1])
for way in ("trainer", "function", "checkpointed"):
    torch.save(trained(way, folder / way, 4), folder / f"{way}{os.environ['RANK']}.pt")
"""


@pytest.fixture(scope="module")
def in_two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    (folder / "script.py").write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d"]
    command += [
        "--rdzv-endpoint",
        "localhost:0",
        str(folder / "script.py"),
        str(folder),
        str(ROOT),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("way", ["trainer", "function", "checkpointed"])
def test_two_processes_are_one(way: str, in_two_processes: Path, tmp_path: Path) -> None:
    expected = trained(way, tmp_path, 8)
    first, second = (torch.load(in_two_processes / f"{way}{rank}.pt") for rank in range(2))
    for kind, one, other, alone in zip(("model", "regularizer"), first, second, expected):
        for name in alone:
            assert torch.equal(one[name], other[name]), (kind, name)
            assert torch.allclose(one[name].double(), alone[name].double(), atol=1e-10, rtol=0), (kind, name)
