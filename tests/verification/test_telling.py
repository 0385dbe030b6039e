"""How ``verify`` tells what it found: tables, errors, the command."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from saliency_reg import FeatureSurgery, SaliencyRegularizer, verify
from saliency_reg.errors import AlreadyAttachedError, ConfigurationError, VerificationError, WrongTypeError
from saliency_reg.verification.__main__ import main
from tests.support.paths import ROOT
from tests.support.zoo import build

from .support import Centred, Net, X, failed, report_of, with_part


def test_axes_and_masks_are_told() -> None:
    entry = build("token heads")
    found = verify(entry.model, entry.inputs, show=False, **entry.options)["heads"].found
    assert " samples, " in found
    assert "(axis 2 of [" in found
    shape = eval(found.split("axis 2 of ")[1].split(")")[0])
    nothing = torch.zeros(shape[:2], dtype=torch.bool)
    report = verify(entry.model, entry.inputs, show=False, **{**entry.options, "mask": nothing})
    assert report["saliency"].passed is False
    assert "mask" in report["saliency"].found


def test_errors_of_the_users_functions() -> None:
    found = report_of(Net(), losses=lambda out: {"a": out["foo"]})["share"]
    assert "your losses= raised KeyError: 'foo' (" in found.found
    assert f"{Path(__file__).name}:" in found.found
    found = report_of(Net(), backward=lambda losses: None)["surgery"]
    assert "your backward= raised TypeError" in found.found
    assert (
        "has none for 'b', 'c'" in report_of(Net(), losses=lambda out: {"a": out["a"].square().mean()})["share"].found
    )


def test_strict_raises_and_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        VerificationError, match=r"(?s)2 checks failed:\nsaliency .*\nsamples +FAIL  .*'heads.b.1' \(Centred\)"
    ):
        verify(with_part(Centred()), X, strict=True)
    assert "2 of 9 checks failed" in capsys.readouterr().out
    assert verify(Net(), X, strict=True).passed


def test_wrong_use() -> None:
    model = Net()
    with pytest.raises(WrongTypeError, match="model must be"):
        verify("model", X)
    with pytest.raises(WrongTypeError, match="losses= must be a function"):
        verify(model, X, losses={"a": torch.zeros(())})
    with pytest.raises(ConfigurationError, match="lazy"):
        verify(nn.LazyLinear(2), X)
    with pytest.raises(TypeError, match="strenght"):
        verify(model, X, strenght=1)
    report = verify(model, X, heads="head", show=False)
    assert failed(report) == ["heads"]
    assert "'head'" in report["heads"].found
    assert report["saliency"].found == "not checked: the regularizer could not be built"
    regularizer = SaliencyRegularizer(model, "heads", strength=0.1, metric="l1")
    with pytest.raises(AlreadyAttachedError, match="regularizer=it"):
        verify(model, X)
    with pytest.raises(ConfigurationError, match=r"\['strength'\] are those of the regularizer"):
        verify(model, X, regularizer=regularizer, strength=1.0)
    with pytest.raises(WrongTypeError, match="attached to the model"):
        verify(model, X, regularizer=copy.deepcopy(regularizer))
    regularizer.remove()
    FeatureSurgery(model, "heads")
    with pytest.raises(AlreadyAttachedError, match=r"call .remove\(\)"):
        verify(model, X)


COMMAND = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.backbone = nn.Linear(4, 3)
        self.heads = nn.ModuleDict({"a": nn.Sequential(nn.Linear(3, 3), part, nn.Linear(3, 1)), "b": nn.Linear(3, 1)})
    def forward(self, x):
        feature = self.backbone(x)
        return {task: head(feature) for task, head in self.heads.items()}

class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)

def healthy(): return Net(nn.Tanh()), torch.randn(4, 4)
def defect(): return {"model": Net(Centred()), "batch": torch.randn(4, 4), "heads": "heads"}
def wrong(): return Net(nn.Tanh())
def raises(): return {}["foo"]
def typo(): return {"model": Net(nn.Tanh()), "batch": torch.randn(4, 4), "strenght": 1}
def shapes(): return Net(nn.Tanh()), torch.randn(4, 7)
"""


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(COMMAND)
    path = {"PYTHONPATH": str(ROOT)}
    for what, code, words in (("healthy", 0, "No check failed."), ("defect", 1, "'heads.a.1' (Centred)")):
        command = [sys.executable, "-m", "saliency_reg.verification", f"mine:{what}"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, **path})
        assert done.returncode == code, done.stdout + done.stderr
        assert words in done.stdout


@pytest.mark.parametrize(("what", "code", "words"), [
    (["mine:healthy"], 0, ""),
    (["mine:wrong"], 2, "expected (model, batch) or a dict with both"),
    (["mine:nothing"], 2, "cannot be imported"),
    (["nowhere:nothing"], 2, "cannot be imported"),
    (["mine:raises"], 2, "'mine:raises' raised KeyError: 'foo'"),
    (["mine:typo"], 2, "no option 'strenght'. Did you mean 'strength'?"),
    (["mine:shapes"], 2, "mat1 and mat2"),
    (["mine.py:healthy"], 2, "Leave out .py: mine:healthy"),
    (["mine"], 2, "is no file, and names no function"),
    (["saved.pt"], 2, "loading a pickled model runs whatever code is in it. Pass --trust if you wrote it"),
    (["saved.pt", "--trust"], 0, ""),
])  # fmt: skip
def test_what_the_command_takes(
    what: list[str],
    code: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "mine.py").write_text(COMMAND)
    torch.save((build("tanh heads").model, build("tanh heads").inputs), "saved.pt")
    assert main(what) == code
    error = capsys.readouterr().err
    assert words in error
    assert code != 2 or len(error.splitlines()) == 1
