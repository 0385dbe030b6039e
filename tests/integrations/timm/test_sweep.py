"""A sample of the families that `python -m recipes.timm_sweep` goes through, and its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes import timm_sweep
from recipes.sweeps import runner, timm_families
from recipes.sweeps.timm_families import check_family, families, passes, smallest_models

#: Convolutions, transformers and mixers; maps, tokens with and without class tokens, lists of maps, distilled pairs.
SAMPLE = [
    "test_resnet",
    "test_convnext",
    "test_mambaout",
    "test_coatnet",
    "test_vit",
    "mobilevit_xxs",
    "lcnet_035",
    "gmlp_ti16_224",
    "xcit_nano_12_p8_224",
    "deit_tiny_distilled_patch16_224",
    "pit_ti_224",
    "coat_tiny",
]


@pytest.mark.parametrize("name", SAMPLE)
def test_family(name: str) -> None:
    result = check_family(name)
    assert result["reasons"] == {}
    assert passes(result)
    assert result["unmodified_map"]


def test_batch_norm_in_front_of_the_logits_does_not_pass() -> None:
    result = check_family("levit_128s")
    assert result["multi_task"]
    assert not passes(result)
    assert "CrossSampleError" in result["reasons"]["unmodified"]


def test_the_smallest_models() -> None:
    assert len(families()) > 80
    found = smallest_models(["gemma4_vit", "tnt"])
    assert {family: entry["model"] for family, entry in found.items()} == {
        "gemma4_vit": "gemma4_vit_167m",  # not its encoder, which is smaller
        "tnt": "tnt_s_legacy_patch16_224",
    }


def test_a_sweep_fails_if_families_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def result(check: object, failed: object, model: str, seconds: int) -> dict:
        good = model != "inception_v4"
        return {
            "image_size": 32, "layout": "[B, C, H, W]", "multi_task": True, "unmodified": good, "unmodified_map": True,
            "reasons": {} if good else {"unmodified": "no memory"}, "notes": [], "seconds": 1.5,
        }  # fmt: skip

    monkeypatch.setattr(runner, "in_child", result)
    assert timm_sweep.main(["--families", "inception_v4", "inception_v3", "--out", str(tmp_path), "--name", "bad"]) == 1
    printed = capsys.readouterr().out
    assert "both ways: 1 of 2 families (50.0 %)" in printed
    assert "unmodified: no memory" in printed
    written = json.loads((tmp_path / "bad" / "results.json").read_text())
    assert (written["passed"], written["families"]) == (1, 2)
    assert written["results"]["inception_v4"]["parameters"] > 1e7
    assert timm_sweep.main(["--families", "inception_v3", "--out", str(tmp_path), "--name", "good"]) == 0
    with pytest.raises(SystemExit):
        timm_sweep.main(["--families", "inception_v3", "--out", str(tmp_path), "--name", "good"])
    assert "Pass another name" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        timm_sweep.main(["--families", "resnetz"])
    assert "has no family 'resnetz'. Did you mean resnet" in capsys.readouterr().err


def test_a_child_that_dies_or_hangs() -> None:
    died = runner.in_child(check_family, timm_families.failed, "no_such_model", 120)
    assert not passes(died)
    assert "UnknownModelError" in died["reasons"]["multi_task"] or "AttributeError" in died["reasons"]["multi_task"]
    hung = runner.in_child(check_family, timm_families.failed, "test_resnet", 1)
    assert hung["reasons"]["multi_task"] == "not finished within 1 seconds"
