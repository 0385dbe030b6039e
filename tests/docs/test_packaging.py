"""What is installed, and what importing it costs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import saliency_reg
from tests.support.paths import ROOT


def run_python(code: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_integrations_from_the_checkout(tmp_path: Path) -> None:
    code = "import saliency_reg.integrations as i; print(i.__file__)"
    for folder in (ROOT, tmp_path):
        assert Path(run_python(code, folder)).resolve().parent == ROOT / "integrations"


FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "integrations")


def wheel_of(source: Path, folder: Path) -> Path:
    """The wheel, in the folder, of these sources: links, as building in place would leave a build folder in the checkout."""
    for name in FILES:
        (source / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    (source / "saliency_reg").symlink_to(ROOT / "saliency_reg")
    return wheel_of(source, folder)


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"saliency_reg", f"saliency_reg-{saliency_reg.__version__}.dist-info"}
    assert "saliency_reg/py.typed" in names
    assert "saliency_reg/integrations/__init__.py" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_every_module_on_disk_is_in_the_wheel(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    core = {str(path.relative_to(ROOT)) for path in (ROOT / "saliency_reg").rglob("*.py")}
    guests = {f"saliency_reg/{path.relative_to(ROOT)}" for path in (ROOT / "integrations").rglob("*.py")}
    assert names == core | guests


def test_without_links_the_wheel_is_the_same(wheel: Path, tmp_path: Path) -> None:
    """Out of a zip, or on Windows, the link to the integrations is a file with its text."""
    source = tmp_path / "source"
    source.mkdir()
    shutil.copytree(ROOT / "saliency_reg", source / "saliency_reg", ignore=shutil.ignore_patterns("integrations"))
    (source / "saliency_reg" / "integrations").write_text("../integrations")
    found = wheel_of(source, tmp_path)
    with zipfile.ZipFile(wheel) as ours, zipfile.ZipFile(found) as theirs:
        assert sorted(theirs.namelist()) == sorted(ours.namelist())
        assert all(theirs.read(name) == ours.read(name) for name in ours.namelist() if name.endswith(".py"))


def test_type_checkers_see_the_package(tmp_path: Path) -> None:
    """In the README's own install, from another folder, names of the core and of the integrations have their types."""
    pytest.importorskip("mypy")
    (tmp_path / "mine.py").write_text(
        "from saliency_reg import SaliencyRegularizer\n"
        "from saliency_reg.integrations.timm import HeadConfig\n"
        "reveal_type(SaliencyRegularizer(None)), reveal_type(HeadConfig().hidden)\n"
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "--cache-dir=/dev/null", "mine.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert 'Revealed type is "saliency_reg.regularizer.regularizer.SaliencyRegularizer"' in done.stdout, done.stdout
    assert 'Revealed type is "tuple[int, ...]"' in done.stdout
    assert done.returncode == 0, done.stdout


def test_the_wheel_works_elsewhere(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import saliency_reg, saliency_reg.integrations as i; print(saliency_reg.__file__, i.__file__); "
        "assert saliency_reg.SaliencyRegularizer"
    )
    printed = run_python(code, tmp_path, PYTHONPATH=str(tmp_path / "site")).split()
    assert [Path(path).is_relative_to(tmp_path / "site") for path in printed] == [True, True]


def test_the_core_imports_torch_alone() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import saliency_reg; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    standard = {*sys.stdlib_module_names, "torch", "saliency_reg"}
    assert [name for name in run_python(code, ROOT).split() if name not in standard] == []


def test_importing_leaves_the_user_alone() -> None:
    """No logging set-up, no random numbers, no threads changed."""
    code = (
        "import logging, torch; torch.manual_seed(0); state = torch.get_rng_state(); threads = torch.get_num_threads(); "
        "import saliency_reg; assert torch.equal(state, torch.get_rng_state()); "
        "assert threads == torch.get_num_threads(); assert not logging.getLogger().handlers"
    )
    run_python(code, ROOT)


def test_the_wheel_has_the_timm_integration_and_it_works_from_there(wheel: Path, tmp_path: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    files = {f"saliency_reg/{path.relative_to(ROOT)}" for path in (ROOT / "integrations" / "timm").rglob("*.py")}
    assert len(files) > 15
    assert files <= names
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import torch, saliency_reg.integrations.timm as own; print(own.__file__); "
        "model = own.TimmMultiTaskModel('test_resnet', ['a', 'b'], image_size=64); print(len(model(torch.zeros(2, 3, 64, 64))))"
    )
    file, heads = run_python(code, tmp_path, PYTHONPATH=str(tmp_path / "site")).split()
    assert Path(file).is_relative_to(tmp_path / "site")
    assert heads == "2"
