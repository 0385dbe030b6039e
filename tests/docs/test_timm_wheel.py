"""The sub-package is in the wheel, and works from there."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.support.paths import ROOT

from .test_packaging import wheel_of


def test_the_wheel_has_the_integration(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "saliency_reg").symlink_to(ROOT / "saliency_reg")
    wheel = wheel_of(source, tmp_path)
    names = set(zipfile.ZipFile(wheel).namelist())
    files = {f"saliency_reg/{path.relative_to(ROOT)}" for path in (ROOT / "integrations" / "timm").rglob("*.py")}
    assert len(files) > 15
    assert files <= names
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import torch, saliency_reg.integrations.timm as own; print(own.__file__); "
        "model = own.TimmMultiTaskModel('test_resnet', ['a', 'b'], image_size=64); print(len(model(torch.zeros(2, 3, 64, 64))))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    file, heads = done.stdout.split()
    assert Path(file).is_relative_to(tmp_path / "site")
    assert heads == "2"
