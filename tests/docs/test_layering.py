"""Who may import whom, and by which names."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

CORE = ROOT / "saliency_reg"
#: What a package shows to the others; what lies behind these names is its own.
FACES = {
    *(
        f"saliency_reg.{name}"
        for name in (
            *("capture", "distributed", "head_penalties", "regularizer", "relations", "saliency"),
            *("torch_tools", "verification"),
        )
    ),
    "saliency_reg.relatedness.views",
    "saliency_reg.surgery",
    "saliency_reg.surgery.feature",
    "saliency_reg.surgery.parameters",
}
PUBLIC = {
    "saliency_reg",
    "saliency_reg.errors",
    *(f"saliency_reg.integrations.{name}" for name in ("accelerate", "plot", "timm", "transformers")),
}
#: Private names of other libraries that have no public way, and ``os._exit``, which is public.
WITHOUT_A_PUBLIC_WAY = {
    "accelerator._custom_objects",
    "accelerator._models",
    "iterator._shutdown_workers",
    "nn.modules.batchnorm._BatchNorm",
    "nn.modules.conv._ConvNd",
    "os._exit",
    "own._buffers",
    "own._from_config",
    "own._tokenizer",
    "registry._model_entrypoints",
    "scalarizer._optimizer",
    "self._loader._iterator",
}


def modules(folder: Path) -> Iterator[tuple[str, Path]]:
    """Dotted names and files; the integrations have the name under which they are imported."""
    for path in sorted(folder.rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        if parts[0] == "integrations":
            parts.insert(0, "saliency_reg")
        if parts[-1] == "__init__":
            parts.pop()
        yield ".".join(parts), path


#: Modules that a package does not offer under the same name, as ``saliency`` does with a function.
ON_DISK = {
    name
    for folder in ("saliency_reg", "integrations")
    for name, path in modules(ROOT / folder)
    if f'"{path.stem}"' not in (path.parent / "__init__.py").read_text(encoding="utf-8")
}


def imported(name: str, path: Path) -> Iterator[str]:
    """The modules that a module imports from, absolute; also one that is taken from its package by name."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names if f"{source}.{alias.name}" in ON_DISK)


def package_of(name: str) -> str | None:
    """The package with a face that a module is in."""
    return max((face for face in FACES if f"{name}.".startswith(f"{face}.")), key=len, default=None)


def test_the_contract_between_packages_holds() -> None:
    pytest.importorskip("importlinter")
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("folder", ["saliency_reg", "integrations"])
def test_other_packages_are_reached_by_their_faces(folder: str) -> None:
    wrong = [
        (name, target)
        for name, path in modules(ROOT / folder)
        for target in imported(name, path)
        if package_of(target) not in (None, target, package_of(name)) or target.partition(".")[0] == "integrations"
    ]
    assert wrong == []


def test_recipes_use_public_modules() -> None:
    wrong = [
        (name, target)
        for name, path in modules(ROOT / "recipes")
        for target in imported(name, path)
        if target.partition(".")[0] == "saliency_reg" and target not in PUBLIC
    ]
    assert wrong == []


@pytest.mark.parametrize("folder", ["integrations", "recipes"])
def test_no_private_names_of_other_objects(folder: str) -> None:
    wrong = []
    for name, path in modules(ROOT / folder):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level:
                private = (alias.name for alias in node.names if alias.name.startswith("_"))
                wrong += [(name, node.lineno, each) for each in private if not each.startswith("__")]
            if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
                continue
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            of_a_base = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "super"
            if not own and not of_a_base and ast.unparse(node) not in WITHOUT_A_PUBLIC_WAY:
                wrong.append((name, node.lineno, ast.unparse(node)))
    assert wrong == []


def test_no_folder_is_full_and_no_file_is_long() -> None:
    for folder in (CORE, ROOT / "integrations"):
        for inner in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            # The link to the integrations is a folder elsewhere, which is looked at by itself.
            entries = {path.name for path in inner.iterdir() if not path.is_symlink()} - {
                "__init__.py",
                "__pycache__",
                "py.typed",
            }
            assert len(entries) <= (13 if inner == CORE else 12), inner
        for path in folder.rglob("*.py"):
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 350, path


def test_only_the_face_of_the_core_is_offered() -> None:
    import saliency_reg

    offered = {name for name in dir(saliency_reg) if not name.startswith("__")}
    assert offered == {*saliency_reg.__all__, "errors"}
    assert set(saliency_reg.errors.__all__) <= set(saliency_reg.__all__)
    for name in saliency_reg.__all__:
        assert getattr(saliency_reg, name).__module__.partition(".")[0] == "saliency_reg"
