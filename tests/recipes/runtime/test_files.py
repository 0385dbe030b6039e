"""Files of a run, and packages that are missing."""

import argparse
import json
import sys

import pytest

from recipes.runtime.errors import need
from recipes.runtime.files import LOCK, new_run_folder, write_json
from recipes.runtime.processes import Ranks
from recipes.runtime.run_folder import open_shared_folder


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


@pytest.mark.skipif(sys.platform == "win32", reason="locks of POSIX")
def test_run_in_a_folder_without_a_place_for_the_lock(tmp_path, capsys):
    (tmp_path / "mine" / LOCK).mkdir(parents=True)
    options = argparse.Namespace(out=tmp_path, name="mine", resume="auto")
    parser = argparse.ArgumentParser()
    alone = Ranks(argparse.Namespace(num_processes=1, process_index=0, is_main_process=True))
    with pytest.raises(SystemExit), open_shared_folder(parser, options, alone, ("digits", 1)):
        pass
    assert "argument --name: cannot write in" in " ".join(capsys.readouterr().err.split())
