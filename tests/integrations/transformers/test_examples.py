"""The examples of the docstrings run, and importing costs nothing."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import subprocess
import sys

import pytest

import saliency_reg.integrations.transformers as package

MODULES = [module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]


@pytest.mark.filterwarnings("ignore:.pin_memory. argument is set as true:UserWarning")
@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.failed == 0


def test_every_public_name_has_an_example_or_is_an_error() -> None:
    for name in package.__all__:
        thing = getattr(package, name)
        assert thing.__doc__, name
        if not issubclass(thing, Exception) if isinstance(thing, type) else True:
            assert ">>>" in thing.__doc__ or name in ("MultiTaskOutput", "SaliencyTrainerMixin"), name


def test_importing_does_not_import_transformers() -> None:
    code = "import sys, saliency_reg.integrations.transformers; assert 'transformers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    with pytest.raises(AttributeError, match="has no attribute 'MultiTaskModell'"):
        package.MultiTaskModell  # noqa: B018
    assert set(package.__all__) <= set(dir(package))
