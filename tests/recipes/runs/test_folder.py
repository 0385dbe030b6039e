"""Images of one's own with a table of labels, run for real."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

from recipes import folder, predict
from recipes.data.images.to_show import Picture
from recipes.data.task_kinds import BINARY, TaskKind
from recipes.models.small_resnet import register_small_backbone
from recipes.runs import image_pictures, shell
from recipes.runtime.errors import need
from recipes.training.metrics import task_scores
from saliency_reg.integrations.timm import TimmMultiTaskModel
from tests.support.two_processes import run_on_two_processes

from ..support.small_images import QUICK, write_folder
from ..support.small_training import as_rank

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
    *_, line = capsys.readouterr().err.splitlines()
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
    assert "23 train, 10 validation, 6 test images; 3 tasks; 80 % of the labels are there." in printed
    lines = printed.splitlines()
    start = lines.index("task    kind       labels  values")
    kept = need("pandas").read_csv(table).drop(index=3)
    shares = (100 * kept["stripe"].value_counts(normalize=True)).round()
    assert lines[start + 1 : start + 4] == [
        f"bright  binary     {kept['bright'].count()}      {100 * kept['bright'].mean():.0f} % positive",
        f"stripe  3 classes  {kept['stripe'].count()}      "
        + ", ".join(
            f"{name} {share:.0f} %" for name, share in sorted(shares.items(), key=lambda pair: (-pair[1], pair[0]))
        ),
        f"level   number     {kept['level'].count()}      20 to 28, mean {kept['level'].mean():.4g}",
    ]

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
    assert set(content["scores"]["level"]) == {"nmse", "pearson"}

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


def test_folder_in_place_of_a_table_and_table_without_labels(table, tmp_path, capsys):
    assert run(str(Path(table).parent), tmp_path / "out")[0] == 1
    assert "found a folder" in error_of(capsys)
    lines = Path(table).read_text().splitlines()
    images = Path(table).with_name("images.csv")
    column = lines[0].split(",").index("image")
    images.write_text("\n".join(line.split(",")[column] for line in lines))
    assert run(str(images), tmp_path / "out")[0] == 1
    assert "has no column of labels beside image. Add one for each task." in error_of(capsys)


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


def test_pictures_that_fail_are_drawn_by_the_next_start(table, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(image_pictures, "draw_saliency", fail)
        code, printed = run(table, tmp_path, *TASKS)
    assert code == 1
    assert "Not all pictures were drawn: [Errno 28] No space left on device" in printed
    before = read(tmp_path / "one")
    assert before["status"] == "complete"
    assert not (tmp_path / "one" / "saliency.png").exists()
    check_that_pictures_are_drawn(table, tmp_path, before)


def test_pictures_that_ctrl_c_stopped_are_drawn_by_the_next_start(table, tmp_path, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(shell, "draw_relations", stop)
        assert run(table, tmp_path, *TASKS)[0] == 130
    check_that_pictures_are_drawn(table, tmp_path, read(tmp_path / "one"))


def check_that_pictures_are_drawn(table, out, before):
    model = (out / "one" / "model" / "model.safetensors").read_bytes()
    code, printed = run(table, out, *TASKS, "--resume", "auto")
    assert code == 0
    assert "Written to" in printed
    names = {path.name for path in (out / "one").glob("*.png")}
    assert names == {"learning_curves.png", "relations.png", "saliency.png", "task_tree.png"}
    assert read(out / "one") == before
    assert (out / "one" / "model" / "model.safetensors").read_bytes() == model
    again = run(table, out, *TASKS, "--resume", "auto")
    assert again == (0, f"The run in {out / 'one'} is complete. Pass another --name to train again.\n")


def test_table_is_printed_before_a_full_disk_is_met(table, tmp_path, monkeypatch, capsys):
    def full(*arguments, **options):
        raise need("safetensors").SafetensorError("No space left on device (os error 28)")

    with monkeypatch.context() as disk:
        disk.setattr(need("safetensors.torch"), "save_model", full)
        code, printed = run(table, tmp_path, *TASKS)
    assert code == 1
    assert "mean over the tasks" in printed
    complaint = error_of(capsys)
    assert complaint.startswith("the model was not saved: ")
    assert "No space left on device" in complaint
    assert complaint.endswith(f"run the same command with --out {tmp_path} --name one --resume auto.")
    assert read(tmp_path / "one")["status"] == "running"
    steps = [line for line in (tmp_path / "one" / "log.jsonl").read_text().splitlines() if '"epoch"' in line]
    code, again = run(table, tmp_path, *TASKS, "--resume", "auto")
    assert code == 0
    assert read(tmp_path / "one")["status"] == "complete"
    assert table_of(again) == table_of(printed)
    after = [line for line in (tmp_path / "one" / "log.jsonl").read_text().splitlines() if '"epoch"' in line]
    assert after[: len(steps)] == steps, "nothing is trained again"


def table_of(printed):
    return printed[printed.index("Best weights") : printed.index("nMSE: ")]


@pytest.mark.parametrize(("tasks", "files"), [(14, ["saliency.png"]), (41, [f"saliency_{n}.png" for n in (1, 2, 3)])])
def test_saliency_pictures_show_all_tasks(tmp_path, monkeypatch, tasks, files):
    drawn = {}
    monkeypatch.setattr(
        image_pictures,
        "draw_saliency",
        lambda images, maps, names, path, **more: drawn.update({path.name: (names, more["labels"])}),
    )
    register_small_backbone()
    names = [f"task {number}" for number in range(tasks)]
    model = TimmMultiTaskModel("saliency_reg_resnet8", names, image_size=32)
    labels = torch.arange(2.0)[:, None].expand(2, tasks).clone()
    labels[0, -1] = float("nan")
    kinds = dict.fromkeys(names, BINARY) | {names[0]: TaskKind("number")}
    picture = Picture(torch.randn(2, 3, 32, 32), labels, (0.5,), (0.2,))
    for name, draw in image_pictures.saliency_pictures(kinds, lambda: model, lambda _: picture).items():
        draw(tmp_path / name)
    assert list(drawn) == files
    assert [name for own, _ in drawn.values() for name in own] == names
    shown = torch.cat([own for _, own in drawn.values()], dim=1)
    assert shown[:, 0].tolist() == [-1, -1], "a number is not true"
    assert shown[:, -1].tolist() == [-1, 1]
    assert shown[:, 1].tolist() == [0, 1]


def write_messy(folder, separator=";", count=40):
    """A table as people have them; returns its path."""
    folder.mkdir()
    lines = [separator.join(("", "image", "red", "warm", "size", "shape", "case_id", "remark"))]
    for row in range(count):
        red = row % 2
        Image.new("RGB", (32, 32), (200 * red, 10 * (row % 20), 60)).save(folder / f"{row}.png")
        cells = (
            row,
            f"{row}.png",
            red,
            ("no", "Yes")[red],
            f"{row % 7},{row % 10}",
            "abc"[row % 3],
            7000 + 3 * row,
            f"It is {row}",
        )
        lines.append(separator.join(f'"{cell}"' if "," in str(cell) else str(cell) for cell in cells))
    (folder / "table.csv").write_text("\n".join(lines) + "\n", encoding="utf-8-sig" if separator == ";" else "utf-8")
    return str(folder / "table.csv")


class TestMessyTables:
    @pytest.mark.parametrize("separator", [";", ",", "|"])
    def test_columns_that_are_no_labels_are_named(self, tmp_path, separator):
        found = loaded(write_messy(tmp_path / "messy", separator))
        assert {task: kind.name for task, kind in found.kinds.items()} == {
            "red": "binary",
            "warm": "binary",
            "size": "number",
            "shape": "classes",
        }
        assert found.figures["left_out"] == {
            "Unnamed: 0": "counts the rows",
            "case_id": "an id by its name, with 40 different values",
            "remark": "40 different texts in 40 rows",
        }
        printed = "\n".join(found.about)
        assert "'Unnamed: 0' (counts the rows); 'case_id' (an id by its name" in printed
        assert "Name the columns to be learned after --tasks otherwise." in printed
        assert "Read with decimal commas: size." in printed
        assert (f"Columns are separated by {separator!r}." in printed) is (separator != ",")
        assert "size   number     40      0 to 6.7, mean " in printed

    def test_columns_that_are_typed_are_taken(self, tmp_path):
        found = loaded(write_messy(tmp_path / "messy"), "--tasks", "red", "case_id", "remark")
        assert list(found.kinds) == ["red", "case_id", "remark"]
        assert found.figures["left_out"] == {}

    def test_rows_that_are_counted_beside_an_image_that_is_skipped(self, tmp_path):
        table = write_messy(tmp_path / "messy")
        truncate(table, "3.png")
        with pytest.warns(UserWarning, match="cannot be read"):
            assert "Unnamed: 0" in loaded(table).figures["left_out"]

    def test_single_slip_is_named_with_its_row(self, tmp_path, capsys):
        table = Path(write_messy(tmp_path / "messy"))
        table.write_text(table.read_text().replace("5.png;1;", "5.png;2;", 1))
        assert run(str(table), tmp_path / "out")[0] == 1
        complaint = error_of(capsys)
        assert "column 'red' has the label 2, expected 0 and 1" in complaint
        assert complaint.endswith("if it is a slip, correct row 5 (5.png).")

    def test_too_few_columns_that_are_labels(self, tmp_path, capsys):
        table = write_messy(tmp_path / "messy", ",")
        lines = [",".join(line.split(",")[:3] + line.split(",")[-2:]) for line in Path(table).read_text().splitlines()]
        Path(table).write_text("\n".join(lines))
        assert run(table, tmp_path / "out")[0] == 1
        assert "only 1 column(s) can be tasks, and relations need two. Left out, since" in error_of(capsys)

    def test_names_that_only_end_like_an_id(self, tmp_path):
        table = Path(write_messy(tmp_path / "messy"))
        table.write_text(table.read_text().replace("case_id", "acid"))
        assert loaded(str(table)).kinds["acid"].name == "number"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The table, and the folder of the model away from its run."""
    place = tmp_path_factory.mktemp("predict")
    table = write_folder(place / "own")
    code, printed = run(table, place, *TASKS)
    assert code == 0, printed
    return table, (place / "one" / "model").rename(place / "elsewhere")


class TestPredict:
    def predicted(self, capsys, *arguments):
        code = predict.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    def test_numbers_are_those_of_the_model(self, trained, tmp_path, capsys):
        table, model_folder = trained
        images = Path(table).parent / "pictures"
        code, out, _ = self.predicted(
            capsys, "--model", model_folder, "--images", images, "--out", tmp_path / "p.csv", "--batch-size", "7"
        )
        assert (code, out) == (0, f"40 images. Written to {tmp_path / 'p.csv'}.\n")
        frame = need("pandas").read_csv(tmp_path / "p.csv")
        assert list(frame.columns) == ["image", "bright", "stripe", "stripe probability", "level"]
        assert frame["image"].tolist() == sorted(path.name for path in images.iterdir())
        saved = json.loads((model_folder / "tasks.json").read_text())
        assert saved["stripe"]["class_names"] == ["low", "middle", "top"]
        model = TimmMultiTaskModel.from_pretrained(model_folder).eval()
        pixels = torch.stack(
            [model.transforms(train=False)(Image.open(images / name).convert("RGB")) for name in frame["image"]]
        )
        with torch.no_grad():
            outputs = model(pixels)
        assert frame["bright"].tolist() == pytest.approx(outputs["bright"].sigmoid().tolist(), abs=2e-4)
        shares, classes = outputs["stripe"].softmax(1).max(1)
        assert frame["stripe"].tolist() == [saved["stripe"]["class_names"][index] for index in classes.tolist()]
        assert frame["stripe probability"].tolist() == pytest.approx(shares.tolist(), abs=2e-4)
        levels = outputs["level"] * saved["level"]["spread"] + saved["level"]["mean"]
        assert frame["level"].tolist() == pytest.approx(levels.tolist(), rel=1e-3)
        assert frame["level"].between(15, 35).all()

    def test_in_a_fresh_process_to_the_terminal(self, trained, tmp_path):
        table, model_folder = trained
        image = Path(table).parent / "pictures" / "000.png"
        (tmp_path / "broken.png").write_bytes(b"none")
        command = [sys.executable, "-m", "recipes.predict", "--model", str(model_folder), "--images", str(image)]
        done = subprocess.run([*command, str(tmp_path / "broken.png")], capture_output=True, text=True, check=True)
        (line,) = [line for line in done.stderr.splitlines() if "cannot be read" in line]
        assert line.startswith(f"Warning: 1 of 2 images cannot be read: {tmp_path / 'broken.png'} (")
        head, row = done.stdout.splitlines()
        assert head == "image,bright,stripe,stripe probability,level"
        assert row.startswith(f"{image},0.")

    def test_images_that_cannot_be_read_are_named(self, trained, tmp_path, capsys):
        table, model_folder = trained
        for name in ("000.png", "001.jpeg"):
            shutil.copy(Path(table).parent / "pictures" / name, tmp_path)
        broken = truncate(str(tmp_path / "x"), "001.jpeg")
        with pytest.warns(UserWarning, match="1 of 2 images cannot be read") as caught:
            code, out, _ = self.predicted(capsys, "--model", model_folder, "--images", tmp_path)
        assert code == 0
        assert str(broken) in str(caught[0].message)
        assert [line.split(",")[0] for line in out.splitlines()] == ["image", "000.png"]
        code, _, err = self.predicted(capsys, "--model", model_folder, "--images", tmp_path, "--strict")
        assert code == 1
        assert "Leave out --strict to skip them" in err

    def test_card_says_what_the_model_does(self, trained):
        _, model_folder = trained
        card = (model_folder / "README.md").read_text()
        assert "| stripe | classes | logits of low, middle, top |" in card
        assert "| mean over the tasks |" in card
        assert "register_small_backbone()" in card
        assert {path.stat().st_mode & 0o777 for path in model_folder.iterdir()} == {0o644}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda folder: (folder / "tasks.json").unlink(), "found no {}/tasks.json. Pass the folder model of a run"),
            (lambda folder: (folder / "tasks.json").write_text("{"), "{}/tasks.json cannot be read"),
            (lambda folder: (folder / "tasks.json").write_text("{}"), "{}/tasks.json is of another model"),
            (lambda folder: (folder / "config.json").unlink(), "config.json' is missing"),
        ],
    )
    def test_folders_that_are_not_whole(self, trained, tmp_path, capsys, change, message):
        table, model_folder = trained
        shutil.copytree(model_folder, tmp_path / "copy")
        change(tmp_path / "copy")
        images = Path(table).parent / "pictures"
        code, _, err = self.predicted(capsys, "--model", tmp_path / "copy", "--images", images)
        assert code == 1
        assert message.format(tmp_path / "copy") in err

    def test_no_images(self, trained, tmp_path, capsys):
        for place, message in ((tmp_path / "nowhere", "found no file or folder"), (tmp_path, "found no images in")):
            code, _, err = self.predicted(capsys, "--model", trained[1], "--images", place)
            assert code == 1
            assert message in err
