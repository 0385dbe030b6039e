"""A sample of the architectures that `python -m recipes.transformers_sweep` goes through, and its table."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes import transformers_sweep
from recipes.sweeps import runner
from recipes.sweeps import transformers_architectures as sweep_architecture
from recipes.sweeps.checks import CheckFailedError
from recipes.sweeps.tiny_models import inputs
from recipes.sweeps.tiny_models.registry import TINY_MODELS, classifier_model
from saliency_reg.errors import CrossSampleError
from saliency_reg.integrations.transformers import saliency_regularizer

pytest.importorskip("transformers")

#: Quick to build and as different as possible.
REPRESENTATIVES = [
    "bert",
    "distilbert",
    "electra",
    "deberta-v2",
    "modernbert",
    "t5",
    "gpt2",
    "vit",
    "swin",
    "convnext",
    "wav2vec2",
    "whisper",
]


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_representative(name: str) -> None:
    result = sweep_architecture.check_architecture(name)
    assert result["reasons"] == {}
    assert sweep_architecture.passes(result)
    assert result["loaded"] == {"unmodified": 0, "multi_task": 0}  # bit for bit
    assert result["classifier"] in dict(classifier_model(TINY_MODELS[name]).named_modules())


def test_batch_norm_in_front_of_the_classifier() -> None:
    """By default the feature is what the Linear reads, behind the BatchNorm of LeViT; in front of it there is no saliency."""
    assert sweep_architecture.check_architecture("levit")["unmodified"] == sweep_architecture.OK
    entry = TINY_MODELS["levit"]
    model = classifier_model(entry).train()
    regularizer = saliency_regularizer(
        model, feature="classifier.batch_norm:input", cross_sample="error", strength=0.1, metric="l1"
    )
    model(**entry.inputs(4, seed=0))
    with pytest.raises(CrossSampleError):
        regularizer()
    regularizer.remove()


def test_padding_that_counts_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saliency_reg.integrations.transformers.model.encoder.mask_of_positions", lambda *_: None)
    result = sweep_architecture.check_architecture("bert")
    assert result["multi_task"] == sweep_architecture.FAILED
    assert "columns of padding less" in result["reasons"]["multi_task"]


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert transformers_sweep.main(["distilbert", "swiftformer", "bros", "fnet"]) == 0
    printed = capsys.readouterr().out
    lines = {line.split()[0]: line for line in printed.splitlines() if line}
    assert lines["distilbert"].split()[:7] == ["distilbert", "text", "ok", "ok", "bit", "for", "bit"]
    assert lines["distilbert"].endswith("  classifier")
    assert "it reads no mask" in printed
    assert "swiftformer, unmodified  FAILED  ClassifierNotFoundError" in printed
    assert "bros, unmodified         none    transformers has BROS for tokens" in printed
    assert "unmodified: 2 of 3 that transformers has a classifier for" in printed
    assert "multi-task: 4 of 4" in printed
    assert printed.endswith("2 of 4 architectures both ways\n")


def test_what_is_not_known_to_fail_fails_the_sweep(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(model: Any, inputs: Any) -> float:
        raise RuntimeError("no room on the disk")

    monkeypatch.setattr(sweep_architecture, "_check_files", broken)
    monkeypatch.setattr(runner, "in_child", lambda check, failed, name, seconds: check(name))
    assert transformers_sweep.main(["resnet", "--workers", "1"]) == 1
    printed = capsys.readouterr().out
    assert "no room on the disk" in printed
    assert "0 of 1 architectures both ways" in printed


def test_a_name_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        transformers_sweep.main(["distilberd"])
    assert "there is no architecture 'distilberd'. Did you mean distilbert" in capsys.readouterr().err


def test_weights_that_are_lost_are_found() -> None:
    model = classifier_model(TINY_MODELS["bert"])
    batch = TINY_MODELS["bert"].inputs(2, seed=0)
    model.register_buffer("forgotten", torch.ones(1))
    with pytest.raises(CheckFailedError, match="forgotten"):
        sweep_architecture._check_files(model, batch)


def test_a_child_that_hangs() -> None:
    hung = runner.in_child(sweep_architecture.check_architecture, sweep_architecture.failed, "dinov3_vit", 1)
    assert (hung["unmodified"], hung["multi_task"]) == (sweep_architecture.NONE, sweep_architecture.FAILED)
    assert hung["reasons"] == {
        "unmodified": "transformers has DINOv3 as a backbone only",
        "multi_task": "not finished within 1 seconds",
    }
    assert not sweep_architecture.as_known(hung)


@pytest.mark.skipif(os.name != "posix", reason="elsewhere a launcher may stand between a process and its parent")
def test_a_child_ends_with_its_sweep() -> None:
    not_its_parent = str(os.getpid() + 1)
    check = sweep_architecture.check_architecture
    command = [sys.executable, "-m", "recipes.sweeps.runner", not_its_parent, check.__module__, check.__name__, "bert"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")


def test_the_tables_of_tiny_models_are_whole() -> None:
    assert len(TINY_MODELS) == 104
    assert {entry.modality for entry in TINY_MODELS.values()} == {"text", "vision", "audio"}
    assert all(callable(getattr(inputs, entry.build_inputs)) for entry in TINY_MODELS.values())
    assert dict(TINY_MODELS["fnet"].options) == {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
    }
