"""GoEmotions on small generated files of its schema."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from sklearn.metrics import f1_score

from recipes import go_emotions
from recipes.data.texts.emotions import EMOTIONS, RARE, emotion_splits
from recipes.data.texts.tokens import TokenisedTexts, trained_tokenizer
from recipes.runs import by_trainer, emotion_run, shell
from recipes.runtime.errors import DataError, OptionError
from recipes.runtime.run_folder import INTERRUPTED, NOT_WRITTEN
from recipes.runtime.termination import TERMINATED
from recipes.training.metrics import best_threshold, f1_scores, with_f1
from saliency_reg.integrations.transformers import MultiTaskModel

from ..support.emotion_texts import rows

WORDS = ("great", "sad", "why", "thanks", "awful", "love", "really", "dog", "house", "today", "never", "blue")


@pytest.fixture(scope="module")
def with_test(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emotions")
    for seed, (name, number) in enumerate({"train": 120, "validation": 40, "test": 50}.items()):
        rows(number, seed, f"{name} ").to_parquet(folder / f"{name}.parquet")
    return folder


@pytest.fixture(scope="module")
def without_test(with_test: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local")
    for name in ("train", "validation"):
        (folder / f"{name}.parquet").write_bytes((with_test / f"{name}.parquet").read_bytes())
    return folder


def test_splits_of_the_hub(with_test: Path) -> None:
    splits = emotion_splits(str(with_test), seed=3, train_texts=100, labelled=0.3)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (100, 40, 50)
    assert splits.test_name == "test"
    assert {text.split()[0] for text in splits.test.texts} == {"test"}
    assert {text.split()[0] for text in splits.validation.texts} == {"validation"}
    known = ~torch.isnan(splits.train.labels)
    assert 0.25 < known.float().mean() < 0.35
    assert not torch.isnan(splits.validation.labels).any()
    same = emotion_splits(str(with_test), seed=3, train_texts=100, labelled=0.3)
    assert same.train.texts == splits.train.texts
    assert torch.equal(same.train.labels.nan_to_num(-1), splits.train.labels.nan_to_num(-1))
    assert emotion_splits(str(with_test), seed=4, train_texts=100).train.texts != splits.train.texts


def test_without_a_test_split_validation_texts_come_from_the_training_split(without_test: Path) -> None:
    splits = emotion_splits(str(without_test), seed=3, train_texts=None, validation_texts=30)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (90, 30, 40)
    assert splits.test_name == "validation"
    assert {text.split()[0] for text in splits.validation.texts} == {"train"}


def test_texts_that_are_tested_are_not_trained_on(tmp_path: Path) -> None:
    train, test = rows(20, 0), rows(5, 1, "x ")
    test.loc[0, "text"] = train.loc[3, "text"]
    for name, own in (("train", train), ("validation", rows(5, 2, "y ")), ("test", test)):
        own.to_parquet(tmp_path / f"{name}.parquet")
    splits = emotion_splits(str(tmp_path), seed=0, train_texts=None)
    assert train.loc[3, "text"] not in splits.train.texts
    assert len(splits.train) == 20 - int((train["text"] == train.loc[3, "text"]).sum())


def test_labels_are_the_emotions(with_test: Path) -> None:
    splits = emotion_splits(str(with_test), seed=0, train_texts=None)
    published = pd.read_parquet(with_test / "test.parquet")
    for row, own in enumerate(published["labels"]):
        assert torch.nonzero(splits.test.labels[row]).flatten().tolist() == sorted(own)
    assert len(EMOTIONS) == 28
    assert set(RARE) < set(EMOTIONS)


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"train_texts": 1000}, OptionError, "1000 training texts were asked for, and there are 120"),
        ({"validation_texts": 1000}, OptionError, "1000 validation texts were asked for"),
        ({"labelled": 0.0}, OptionError, "must be above 0"),
    ],
)
def test_numbers_out_of_range(options: dict[str, Any], kind: type[Exception], text: str, with_test: Path) -> None:
    with pytest.raises(kind, match=text):
        emotion_splits(str(with_test), seed=0, **{"train_texts": 10, **options})


def test_other_data(tmp_path: Path) -> None:
    for name in ("train", "validation"):
        pd.DataFrame({"text": ["a"], "labels": [[28]]}).to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(DataError, match="has the label 28, expected 0 to 27"):
        emotion_splits(str(tmp_path), seed=0, train_texts=None, validation_texts=0)
    with pytest.raises(DataError, match="found no folder"):
        emotion_splits("./nowhere", seed=0, train_texts=None)


def test_a_batch_is_padded_and_nothing_else() -> None:
    texts = ("sad dog", "really great blue house today", "why")
    tokenizer = trained_tokenizer(texts * 3, 60)
    labels = torch.arange(6.0).reshape(3, 2)
    tokens, own = TokenisedTexts(tokenizer, texts, labels, 32).rows_as_batch([2, 0])
    assert torch.equal(own, labels[[2, 0]])
    for row, text in enumerate(("why", "sad dog")):
        ids = tokens["input_ids"][row][tokens["attention_mask"][row].bool()]
        assert ids.tolist() == tokenizer(text)["input_ids"]
    assert (tokens["input_ids"][tokens["attention_mask"] == 0] == tokenizer.pad_token_id).all()


def test_every_process_learns_the_same_tokens() -> None:
    code = (
        "from recipes.data.texts.tokens import trained_tokenizer; "
        "from tests.recipes.support.emotion_texts import rows; "
        "print(sorted(trained_tokenizer(tuple(rows(200, 0)['text']), 60).get_vocab().items()))"
    )
    run = partial(subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = (run().stdout for _ in range(2))
    assert "##" in first
    assert first == second


def test_f1_is_that_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 4, generator=generator), torch.randint(2, (50, 4), generator=generator).float()
    labels[:, 3] = 0
    found = f1_scores(logits, labels, 0.3)
    for task in range(3):
        assert found[task] == pytest.approx(f1_score(labels[:, task], logits[:, task] > 0.3))
    assert found[3] != found[3]
    labels[:5, 0] = torch.nan
    assert f1_scores(logits, labels, 0.3)[0] == pytest.approx(f1_score(labels[5:, 0], logits[5:, 0] > 0.3))


def test_the_threshold_is_the_best_of_all() -> None:
    logits = torch.tensor([[-3.0], [-2.0], [-1.0], [0.5]])
    threshold = best_threshold(logits, torch.tensor([[0.0], [1.0], [1.0], [1.0]]))
    assert -3 < threshold < -2


def test_the_threshold_is_chosen_on_validation() -> None:
    logits = torch.tensor([[-3.0], [-2.0], [-1.0], [0.5]])
    validation = {"outputs": logits, "labels": torch.tensor([[0.0], [1.0], [1.0], [1.0]])}
    test = {"outputs": logits, "labels": torch.tensor([[0.0], [0.0], [0.0], [1.0]])}
    scores, more = with_f1({"a": {"auc": 1.0}}, test, validation, ["a"])
    assert more["threshold"] == pytest.approx(torch.tensor(best_threshold(**_named(validation))).sigmoid().item())
    assert scores["a"]["f1"] == pytest.approx(0.5)  # 1 of 3 that are said is true
    assert (more["f1"], more["f1_rare"], more["auc_rare"]) == (scores["a"]["f1"], scores["a"]["f1"], 1.0)


def _named(split: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"logits": split["outputs"], "labels": split["labels"]}


SMALL = ["--epochs", "2", "--width", "16", "--head-width", "4", "--batch-size", "16", "--warmup-steps", "2"]


@pytest.mark.parametrize(
    ("loop", "method", "encoder"),
    [
        ("trainer", "srdml_pcgrad", "small"),
        ("trainer", "pcgrad", "small"),
        ("accelerate", "srdml_sqchordal", "small"),
        ("trainer", "srdml_entropic", "folder"),
    ],
)
def test_a_run(
    loop: str, method: str, encoder: str, with_test: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strength = [] if method == "pcgrad" else ["--strength", "0.01"]
    command = ["--data", str(with_test), "--loop", loop, "--method", method, *strength, *SMALL]
    command += ["--out", str(tmp_path), "--name", "run"]
    if encoder == "folder":
        texts = emotion_splits(str(with_test), seed=0, train_texts=None).train.texts
        tokenizer = trained_tokenizer(texts, 100)
        tokenizer.save_pretrained(str(tmp_path / "encoder"))
        from transformers import BertModel

        from recipes.models.text_encoders import small_encoder

        BertModel(small_encoder(len(tokenizer), width=16)).save_pretrained(str(tmp_path / "encoder"))
        command += ["--encoder", str(tmp_path / "encoder")]
    assert go_emotions.main(command) == 0
    said = capsys.readouterr().out
    assert "120 training and 40 validation texts, 50 test texts (the published test split)" in said
    assert all(emotion in said for emotion in EMOTIONS)
    assert "mean of 8 rare ones" in said
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["status"] == "complete"
    assert set(results["scores"]) == set(EMOTIONS)
    assert 0 <= results["macro"]["f1"] <= 1
    assert (results["relations"] is None) == (method == "pcgrad")
    assert (tmp_path / "run" / "relations.png").exists() == (method != "pcgrad")
    model = MultiTaskModel.from_pretrained(str(tmp_path / "run" / "model"))
    assert model.tasks == EMOTIONS
    assert go_emotions.main([*command, "--resume", "auto"]) == 0
    assert "is complete" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--method", "pcgrad_parameters"], "does not have the method pcgrad@parameters"),
        (["--temperature", "0.1"], "does not have --temperature"),
        (["--encoder", "./nowhere"], "no tokenizer could be loaded from ./nowhere"),
    ],
)
def test_bad_options(
    options: list[str], text: str, with_test: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--data", str(with_test), *SMALL, "--out", str(tmp_path), "--name", "run", *options]
    assert go_emotions.main(command) == 1
    assert text in capsys.readouterr().err


def _run(with_test: Path, out: Path, *more: str) -> int:
    command = ["--data", str(with_test), *SMALL]
    return go_emotions.main([*command, "--out", str(out), "--name", "run", *more])


def _figures(out: Path) -> tuple[Any, bytes]:
    results = json.loads((out / "run" / "results.json").read_text())
    assert results["status"] == "complete"
    return [results[name] for name in ("scores", "relations", "best_epochs")], (
        out / "run" / "model" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("stops_at", [3, 8, 12])
def test_a_terminated_run_of_the_trainer_goes_on_as_if_it_had_not_been(
    stops_at: int, with_test: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An epoch has eight steps."""
    steps: list[int] = []

    @contextlib.contextmanager
    def stopping() -> Iterator[Callable[[], bool]]:
        def stops() -> bool:
            steps.append(len(steps))
            return len(steps) == stops_at

        yield stops

    with monkeypatch.context() as patched:
        patched.setattr(by_trainer, "deferred", stopping)
        assert _run(with_test, tmp_path / "stopped") == TERMINATED
    assert "To go on, run the same command with" in capsys.readouterr().out
    assert _run(with_test, tmp_path / "stopped", "--resume", "auto") == 0
    assert _run(with_test, tmp_path / "whole") == 0
    assert _figures(tmp_path / "stopped") == _figures(tmp_path / "whole")


def test_pictures_that_were_not_drawn_are_drawn_by_the_next_start(
    with_test: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"

    def interrupted(relations: Any, tasks: Any, path: Path, title: str) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(shell, "draw_task_tree", interrupted)
        assert _run(with_test, tmp_path) == INTERRUPTED
    assert "mean of 8 rare ones" in capsys.readouterr().out
    assert not list(folder.glob("*task_tree*"))
    before = (folder / "relations.png").stat().st_mtime_ns
    with monkeypatch.context() as patched:
        patched.setattr(shell, "draw_task_tree", full)
        assert _run(with_test, tmp_path, "--resume", "auto") == NOT_WRITTEN
    assert "Not all pictures were drawn: [Errno 28] No space left on device" in capsys.readouterr().out
    assert _run(with_test, tmp_path, "--resume", "auto") == 0
    assert "is complete" in capsys.readouterr().out
    assert (folder / "task_tree.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "relations.png").stat().st_mtime_ns == before


def test_a_full_disk_leaves_the_table(
    with_test: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(emotion_run.EmotionRun, "save", full)
    with pytest.raises(OSError, match="No space left"):
        _run(with_test, tmp_path)
    assert "mean of 8 rare ones" in capsys.readouterr().out
