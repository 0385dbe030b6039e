"""The examples of the docstrings run, and importing costs nothing."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import subprocess
import sys

import saliency_reg.integrations.timm as package


def test_examples() -> None:
    attempted = 0
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        found = doctest.testmod(importlib.import_module(module.name), optionflags=doctest.NORMALIZE_WHITESPACE)
        assert found.failed == 0, module.name
        attempted += found.attempted
    assert attempted >= 30


def test_every_public_name_has_an_example_or_is_an_error() -> None:
    for name in package.__all__:
        thing = getattr(package, name)
        assert thing.__doc__, name
        assert ">>>" in thing.__doc__ or issubclass(thing, Exception), name


def test_importing_does_not_import_timm() -> None:
    code = "import sys, saliency_reg.integrations.timm; assert 'timm' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
