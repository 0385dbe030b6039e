"""Files of a run, and packages that are missing."""

import json
import sys

import pytest

from recipes.runtime.errors import need
from recipes.runtime.files import new_run_folder, write_json


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r'needs scikit-learn.*pip install "saliency-reg\[recipes\]"'):
        need("sklearn")


def test_json_is_whole_or_absent(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"loss": float("nan"), "curve": (1.0, float("inf"))})
    assert json.loads(path.read_text()) == {"loss": None, "curve": [1.0, None]}
    with pytest.raises(TypeError):
        write_json(path, {"loss": object()})
    assert json.loads(path.read_text()) == {"loss": None, "curve": [1.0, None]}
    assert list(tmp_path.iterdir()) == [path]


def test_two_runs_within_a_second(tmp_path):
    assert new_run_folder(tmp_path, None) != new_run_folder(tmp_path, None)
