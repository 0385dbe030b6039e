"""CelebA, run for real on a few images of the schema of the hub."""

import contextlib
import io
import json
import math
import re

import pytest
import torch

from recipes import celeba
from recipes.data.images.celeba import ATTRIBUTES
from recipes.data.task_kinds import BINARY
from recipes.models.small_resnet import register_small_backbone
from recipes.training.metrics import task_scores
from saliency_reg.integrations.timm import TimmMultiTaskModel

from ..support.small_images import QUICK, parquet, pyarrow, write_celeba

pytestmark = pytest.mark.usefixtures("quiet_hub")

SOME = ("--tasks", "Smiling", "Male", "Young")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_celeba(tmp_path_factory.mktemp("celeba"))


def run(data, out, *arguments):
    place = ["--data", data, "--out", str(out), "--name", "one"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = celeba.main([*QUICK, *place, *arguments])
    return code, printed.getvalue()


def read(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def loaded(data, *arguments):
    return celeba._load(celeba._parser().parse_args(["--data", data, *arguments]))


def splits(data, *arguments):
    """Labels of all splits; their images are decoded by the model's transforms."""
    found = loaded(data, *arguments)
    return found, found.data(small_model(list(found.kinds)))


def small_model(tasks):
    register_small_backbone()
    return TimmMultiTaskModel("saliency_reg_resnet8", list(tasks), image_size=32)


def test_all_attributes_but_a_constant_one(data, tmp_path):
    with pytest.warns(UserWarning, match="left out, because there is nothing to learn: 'Bald'"):
        code, printed = run(data, tmp_path, "--epochs", "1", "--method", "hard_sharing")
    assert code == 0
    assert "CelebA, 39 attributes: 40 train, 20 validation, 20 test images." in printed
    content = read(tmp_path / "one")
    assert list(content["scores"]) == [name for name in ATTRIBUTES if name != "Bald"]
    assert list(content["data"]["left_out"]) == ["Bald"]


def test_model_that_was_kept_has_these_scores(data, tmp_path):
    code, printed = run(data, tmp_path, *SOME, "--epochs", "6", "--train-images", "30", "--labelled", "0.8")
    assert code == 0
    assert "3 attributes: 30 train, 20 validation, 20 test images" in printed
    content = read(tmp_path / "one")
    assert content["scores"]["Male"]["auc"] > 0.9, "it can be seen"
    register_small_backbone()
    model = TimmMultiTaskModel.from_pretrained(tmp_path / "one" / "model").eval().to(memory_format=torch.channels_last)
    test = loaded(data, *SOME).data(model).test
    images, labels = (torch.stack(rows) for rows in zip(*(test[index] for index in range(len(test)))))
    with torch.no_grad():
        outputs = torch.stack(list(model(images).values()), dim=1)
    found = task_scores(outputs, labels, dict.fromkeys(model.tasks, BINARY))
    assert {task: pytest.approx(own) for task, own in found.items()} == content["scores"]
    names = {path.name for path in (tmp_path / "one").glob("*.png")}
    assert names == {"learning_curves.png", "relations.png", "saliency.png", "task_tree.png"}


def test_labels_are_those_of_the_rows(data):
    _, found = splits(data, "--tasks", "Male", "Bangs")
    for source in (found.validation, found.test):
        bright = torch.tensor([source[index][0].mean() > -0.2 for index in range(len(source))])
        male = torch.stack([source[index][1] for index in range(len(source))])[:, 0] > 0.5
        assert torch.equal(bright, male)


def test_attributes_that_are_named_twice_count_once(data):
    once, twice = (splits(data, "--tasks", *tasks)[1] for tasks in (["Male", "Young"], ["Male", "Male", "Young"]))
    for index in range(20):
        assert torch.equal(once.test[index][1], twice.test[index][1])


def test_minus_one_is_no(tmp_path):
    """As in the attribute file of the authors, also where a split has no 1 at all."""
    sizes = {"train": 40, "valid": 20, "test": 20}
    plain = splits(write_celeba(tmp_path / "bool", sizes), *SOME)[1]
    signed = splits(write_celeba(tmp_path / "signs", sizes, label=lambda yes: 1 if yes else -1), *SOME)[1]
    for index in range(40):
        assert torch.equal(plain.train[index][1], signed.train[index][1])
    with pytest.warns(UserWarning, match="'Bald'"):
        loaded(str(tmp_path / "signs"))


def test_only_training_labels_are_removed(data):
    _, whole = splits(data, *SOME)
    _, few = splits(data, *SOME, "--labelled", "0.5")
    removed = 0
    for index in range(40):
        before, after = whole.train[index][1], few.train[index][1]
        missing = torch.isnan(after)
        removed += int(missing.sum())
        assert torch.equal(before[~missing], after[~missing])
    assert 40 < removed < 80
    assert not any(torch.isnan(own[index][1]).any() for own in (few.validation, few.test) for index in range(20))


def test_training_images_are_drawn_by_the_seed(data):
    def drawn(*arguments):
        return splits(data, *SOME, "--train-images", "10", *arguments)[1].train._rows

    assert drawn() == drawn("--seed", "0") != drawn("--seed", "1")
    assert len(set(drawn())) == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "Smilin", "Male"], "has no column 'Smilin'. Did you mean 'Smiling'?"),
        (["--tasks", "Male"], "only 1 task(s) can be learned"),
        (["--test-images", "21"], "--test-images 21 were asked for, but there are 20. Use 20 or less"),
        (["--labelled", "2"], "must be at most 1, found --labelled 2"),
        (["--data", "/nowhere/at/all"], "found no folder /nowhere/at/all"),
        (["--tasks", "celeb_id", "Male"], "column 'celeb_id' has the label"),
    ],
)
def test_bad_input_ends_with_one_line_and_no_folder(data, tmp_path, capsys, arguments, message):
    assert run(data, tmp_path, *arguments)[0] == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m recipes.celeba: error: ")
    assert message in line
    assert not list(tmp_path.iterdir())


def test_image_that_cannot_be_read_ends_the_training(tmp_path, capsys):
    data = write_celeba(tmp_path / "data", {"train": 12, "valid": 4, "test": 4})
    (path,) = (tmp_path / "data" / "data").glob("train-*")
    table = parquet.read_table(path)
    images = [*table["image"].to_pylist()[:7], *[{"bytes": b"none", "path": "x"}] * 5]
    parquet.write_table(table.set_column(0, "image", pyarrow.array(images)), path)
    for workers in ("0", "2"):
        assert run(data, tmp_path / workers, *SOME, "--data-workers", workers)[0] == 1
        complaint = capsys.readouterr().err
        assert "Traceback" not in complaint
        assert re.search(r"error: row \d+ of the data has no readable image .*Remove it.$", complaint.strip())


def test_validation_labels_of_one_kind_are_no_success_in_silence(tmp_path):
    """No AUC is known, so no epoch is better than another."""
    data = write_celeba(tmp_path / "data", {"train": 20, "valid": 1, "test": 4})
    code, printed = run(data, tmp_path, *SOME, "--epochs", "1")
    assert code == 0
    assert "no task has validation labels of two kinds" in printed
    assert read(tmp_path / "one")["validation"] is None
    assert math.isfinite(read(tmp_path / "one")["macro"]["auc"])
