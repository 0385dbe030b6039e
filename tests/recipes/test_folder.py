"""Images of one's own with a table of labels, run for real."""

import contextlib
import io
import json
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

from recipes import folder
from recipes.data.task_kinds import TaskKind
from recipes.models.small_resnet import register_small_backbone
from recipes.runs import single_run
from recipes.runtime.errors import need
from recipes.training.metrics import task_scores
from saliency_reg.integrations.timm import TimmMultiTaskModel
from tests.support.two_processes import run_on_two_processes

from .small_images import QUICK, write_folder
from .small_training import as_rank

TASKS = ("--tasks", "bright", "stripe", "level")


@pytest.fixture
def table(tmp_path):
    return write_folder(tmp_path / "own")


def run(table, out, *arguments):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = folder.main([*QUICK, "--table", table, "--out", str(out), "--name", "one", *arguments])
    return code, printed.getvalue()


def loaded(table, *arguments):
    return folder._load(folder._parser().parse_args(["--table", table, *arguments]))


def read(path):
    return json.loads((path / "results.json").read_text(encoding="utf-8"))


def truncate(table, name):
    image = Path(table).parent / name
    image.write_bytes(image.read_bytes()[:-30])
    return image


def error_of(capsys):
    (line,) = capsys.readouterr().err.splitlines()
    prefix = "python -m recipes.folder: error: "
    assert line.startswith(prefix)
    return line.removeprefix(prefix)


def test_mixed_kinds_missing_labels_and_a_broken_image(table, tmp_path):
    broken = truncate(table, "pictures/003.jpeg")
    with pytest.warns(UserWarning, match="cannot be read|left out") as caught:
        code, printed = run(table, tmp_path, "--split-column", "part", "--epochs", "5")
    assert code == 0
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 2
    assert texts[0].startswith(f"1 of 40 images cannot be read: {broken} (")
    assert "'nothing' (all 23 labels of training images are the same)" in texts[1]
    assert (
        "23 train, 10 validation, 6 test images; 3 tasks: bright (binary), stripe (3 classes), level (number)"
        in printed
    )

    content = read(tmp_path / "one")
    assert content["data"]["skipped_images"] == 1
    assert content["data"]["classes"] == {"stripe": ["low", "middle", "top"]}
    assert list(content["data"]["left_out"]) == ["nothing"]
    kinds = {task: TaskKind(**kind) for task, kind in content["kinds"].items()}
    assert {task: kind.name for task, kind in kinds.items()} == {
        "bright": "binary",
        "stripe": "classes",
        "level": "number",
    }
    assert set(content["scores"]["level"]) == {"nmse"}

    register_small_backbone()
    model = TimmMultiTaskModel.from_pretrained(tmp_path / "one" / "model").eval().to(memory_format=torch.channels_last)
    with pytest.warns(UserWarning, match="cannot be read"), pytest.warns(UserWarning, match="left out"):
        test = loaded(table, "--split-column", "part").data(model).test
    images, labels = (torch.stack(rows) for rows in zip(*(test[index] for index in range(len(test)))))
    assert torch.isnan(labels).any()
    with torch.no_grad():
        outputs = torch.cat([own.reshape(len(images), -1) for own in model(images).values()], dim=1)
    for task, own in task_scores(outputs, labels, kinds).items():
        assert content["scores"][task] == pytest.approx(own, rel=1e-4), task


def test_labels_are_those_of_the_files(table):
    found = loaded(table, *TASKS)
    frame = need("pandas").read_csv(table).set_index("image")
    kinds = found.kinds
    assert kinds["level"].mean == pytest.approx(24, abs=1.5)
    register_small_backbone()
    splits = found.data(TimmMultiTaskModel("saliency_reg_resnet8", ["a", "b"], image_size=32))
    seen = 0
    for source in (splits.train, splits.validation, splits.test):
        for path, labels in zip(source.paths, source.labels):
            row = frame.loc[f"pictures/{path.name}"]
            stripe = row["stripe"]
            expected = [
                row["bright"],
                ["low", "middle", "top"].index(stripe) if isinstance(stripe, str) else float("nan"),
                row["level"],
            ]
            assert labels.tolist() == pytest.approx(expected, nan_ok=True)
            seen += 1
    assert seen == 40


def test_kinds_and_missing_values_that_are_typed(table):
    path = Path(table)
    path.write_text(path.read_text().replace(",middle,", ",?,"))
    with pytest.warns(UserWarning, match="left out"):
        found = loaded(table, "--missing-value", "?", "-1", "--kind", "bright=classes", "--split-column", "part")
    assert found.kinds["stripe"] == TaskKind("classes", 2)
    assert found.kinds["bright"] == TaskKind("classes", 2)


@pytest.mark.parametrize("kind", ["tsv", "parquet"])
def test_other_tables(table, tmp_path, kind):
    frame = need("pandas").read_csv(table)
    other = tmp_path / f"other.{kind}"
    if kind == "tsv":
        frame.to_csv(other, sep="\t", index=False)
    else:
        frame.to_parquet(other)
    one = loaded(table, *TASKS)
    same = loaded(str(other), *TASKS, "--images", str(Path(table).parent))
    assert one.kinds == same.kinds
    assert one.about == same.about


def test_paths_may_be_absolute(table):
    path = Path(table)
    path.write_text(path.read_text().replace("pictures/", f"{path.parent}/pictures/"))
    assert loaded(table, *TASKS, "--images", "/nowhere").kinds


def test_augmentation_does_not_depend_on_data_workers(table, tmp_path):
    """The logs of whole trainings are the same."""
    found = []
    for workers in ("0", "2"):
        assert run(table, tmp_path / workers, *TASKS, "--data-workers", workers)[0] == 0
        content = read(tmp_path / workers / "one")
        found.append([content[name] for name in ("scores", "curves", "relations")])
    assert found[0] == found[1]


def on_rank(rank, table, out, arguments):
    as_rank(rank)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the task that is left out
        return run(table, out, *arguments)


def test_two_processes_of_which_one_may_have_all_labels_of_a_step(table, tmp_path):
    # Steps of 3 images, of which 2 are in one process, and no BatchNorm, whose statistics are each process' own.
    arguments = [*TASKS, "--split-column", "part", "--backbone", "test_vit", "--batch-size", "3"]
    assert run(table, tmp_path / "alone", *arguments)[0] == 0
    answers = run_on_two_processes(on_rank, table, str(tmp_path / "both"), arguments)
    assert [code for code, _ in answers] == [0, 0]
    both, alone = (read(tmp_path / name / "one") for name in ("both", "alone"))
    assert both["curves"]["training_loss"] == pytest.approx(alone["curves"]["training_loss"], rel=1e-3)
    for task, own in alone["scores"].items():
        assert both["scores"][task] == pytest.approx(own, rel=0.02, abs=0.02), task


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kind", "bright=bool"], "found --kind bright=bool. Pass COLUMN=binary, COLUMN=classes or COLUMN=number"),
        (["--kind", "brigth=number"], "Did you mean 'bright'?"),
        (["--kind", "stripe=number"], "these are no numbers. Use --kind stripe=classes"),
        (["--kind", "level=binary"], "column 'level' has the label 20, expected 0 and 1"),
        (["--kind", "bright=binary"], "column 'part' says train, validation or test, and is no task"),
        (["--image-column", "file"], "has no column 'file'. It has 'image', 'bright'"),
        (["--tasks", "bright", "strip"], "has no column 'strip'. Did you mean 'stripe'?"),
        (["--tasks", "bright"], "only 1 task(s) can be learned"),
        (["--split-column", "stripe"], "has 'top' in the column 'stripe', expected train, validation or test"),
        (["--split-column", "parts"], "has no column 'parts'. Did you mean 'part'?"),
        (["--validation-share", "0.9", "--test-share", "0.1"], "leave nothing to train"),
        (["--validation-share", "0.001"], "the validation split is empty"),
        (["--images", "/nowhere"], "40 of 40 images cannot be read"),
    ],
)
def test_bad_input_ends_with_one_line_and_no_folder(table, tmp_path, capsys, arguments, message):
    tasks = () if "--tasks" in arguments or "--kind" in arguments else TASKS
    assert run(table, tmp_path / "out", *tasks, *arguments)[0] == 1
    assert message in error_of(capsys)
    assert not (tmp_path / "out").exists()


def test_row_with_another_split_is_counted_in_the_table(table, tmp_path, capsys):
    """Also behind images that are skipped."""
    truncate(table, "pictures/003.jpeg")
    path = Path(table)
    lines = path.read_text().splitlines()
    lines[8] = lines[8].replace(",val", ",tset").replace(",train", ",tset")
    path.write_text("\n".join(lines))
    with pytest.warns(UserWarning, match="cannot be read"):
        assert run(table, tmp_path / "out", *TASKS, "--split-column", "part")[0] == 1
    assert "row 7 has 'tset' in the column 'part'" in error_of(capsys)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, "found no file"),
        ("table.txt", "image", "ends in .txt, expected .csv, .tsv or .parquet"),
        ("empty.csv", "", "cannot be read (EmptyDataError"),
        ("only.csv", "image,a,b\n", "has no rows"),
        ("no.parquet", "text", "cannot be read"),
        ("bad.csv", 'image,a\n"x,1\n', "cannot be read"),
    ],
)
def test_tables_that_are_none(tmp_path, capsys, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    assert run(str(tmp_path / name), tmp_path / "out")[0] == 1
    assert message in error_of(capsys)
    assert not (tmp_path / "out").exists()


def test_strict_stops_at_a_broken_image(table, tmp_path, capsys):
    truncate(table, "pictures/003.jpeg")
    assert run(table, tmp_path / "out", *TASKS, "--strict")[0] == 1
    assert "1 of 40 images cannot be read" in error_of(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_broken_image_that_was_not_looked_for(table, tmp_path, capsys, workers):
    truncate(table, "pictures/003.jpeg")
    arguments = ("--check", "none", "--split-column", "part", "--data-workers", workers)
    assert run(table, tmp_path / "out", *TASKS, *arguments)[0] == 1
    complaint = error_of(capsys)
    assert complaint.startswith(f"{Path(table).parent / 'pictures' / '003.jpeg'} cannot be read")
    assert complaint.endswith("Use --check decode to find and skip such files before the training.")


def test_names_that_look_like_numbers_or_nothing_stay_what_they_are(tmp_path):
    rows = []
    for number in range(12):
        Image.new("RGB", (32, 32), (20 * number, 0, 99)).save(tmp_path / f"{number:03d}", format="png")
        rows.append(f"{number:03d},{('None', 'NA', 'cat')[number % 3]},{number % 2 if number != 4 else ''}")
    (tmp_path / "table.csv").write_text("\n".join(["image,kind,odd", *rows]) + "\n")
    found = loaded(str(tmp_path / "table.csv"))
    assert found.figures["classes"] == {"kind": ["NA", "None", "cat"]}
    assert found.figures["skipped_images"] == 0
    assert "97 % of the labels are there" not in found.about[0]
    assert "96 % of the labels are there" in found.about[0]  # 23 of 24


def test_resume_with_other_labels_is_refused(table, tmp_path, capsys):
    assert run(table, tmp_path, *TASKS)[0] == 0
    results = tmp_path / "one" / "results.json"
    content = json.loads(results.read_text(encoding="utf-8"))
    results.write_text(json.dumps({**content, "status": "running"}), encoding="utf-8")
    path = Path(table)
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n", encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        run(table, tmp_path, *TASKS, "--resume", "auto")
    assert stop.value.code == 2
    assert "was begun with other data" in capsys.readouterr().err


def test_pictures_that_fail_do_not_lose_the_run(table, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(single_run, "draw_saliency", fail)
    code, printed = run(table, tmp_path, *TASKS)
    assert code == 1
    assert "Not all pictures were drawn: [Errno 28] No space left on device" in printed
    assert read(tmp_path / "one")["status"] == "complete"
    assert TimmMultiTaskModel.from_pretrained(tmp_path / "one" / "model").tasks
