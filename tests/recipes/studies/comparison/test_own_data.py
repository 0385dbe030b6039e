"""A table of one's own in the comparison: problems of features, texts and images, and the whole command."""

import pytest
import torch
from transformers import BertConfig

from recipes.compare import COMMAND, main
from recipes.data.own_rows.rows import read_rows
from recipes.data.task_kinds import BINARY, TaskKind
from recipes.methods.methods import METHODS
from recipes.models.architectures.registry import ARCHITECTURES
from recipes.models.architectures.registry import build as build_architecture
from recipes.models.pooled_encoder import PooledEncoder
from recipes.studies.comparison.cells import COMPARED_METHODS, train_compared
from recipes.studies.comparison.data_sets.options import place_of, setting_of
from recipes.studies.comparison.data_sets.own_data import SCORE, introduction, metrics_of, own_data_set
from recipes.studies.study import Cell
from recipes.training.batches import Feed, MicroBatch
from recipes.training.metrics import selection_score
from tests.recipes.support.own_tables import breast_cancer, described, digit_images


def features_table(folder, **options):
    path, features, labels = breast_cancer(folder / "cells.csv", **options)
    return ["--table", str(path), "--features", *features], labels


def text_table(folder):
    path, labels = described(folder / "texts.csv")
    return ["--table", str(path), "--text", "text"], labels


def image_table(folder):
    path, labels = digit_images(folder)
    return ["--table", str(path)], labels


TABLES = {"features": features_table, "text": text_table, "image": image_table}


def setting_and_place(arguments):
    options = COMMAND.options_of(arguments)
    return setting_of(options, COMPARED_METHODS), place_of(options)


def result_of(arguments, method, value, seed, folder, reported=True):
    setting, place = setting_and_place(arguments)
    return train_compared(Cell(setting, METHODS[method], value, seed, reported), place, folder).to_dict()


class TestKeys:
    def test_results_of_another_kind_of_task_are_others(self, tmp_path):
        arguments, labels = features_table(tmp_path)
        values = [
            setting_and_place([*arguments, *more])[0].values
            for more in ((), ("--kind", f"{labels[0]}=number"), ("--kind", f"{labels[0]}=classes"))
        ]
        assert values[0] != values[1] != values[2] != values[0]
        assert "kinds" not in values[0]


class TestProblems:
    @pytest.mark.parametrize("form", TABLES)
    def test_batches_and_outputs(self, tmp_path, form):
        arguments, labels = TABLES[form](tmp_path)
        setting, place = setting_and_place([*arguments, "--quick"])
        problem = own_data_set(place.where).build(setting.values, place.where, 3)
        assert list(problem.kinds) == list(problem.blueprint.tasks) == labels
        rows = read_rows(place.where)
        split = rows.split(3, 0.2, 0.2)
        for name, source in (("train", problem.train), ("validation", problem.validation), ("test", problem.test)):
            (batch,) = Feed(source, 0, collate=problem.collate)([MicroBatch(0, list(range(len(source))))])
            assert torch.equal(batch[1], rows.labels[split[name]])
        for architecture in ARCHITECTURES:
            if architecture == "merged" or (architecture == "branching" and form == "text"):
                continue  # of trained single-task models; an encoder cannot be cut
            model = build_architecture(architecture, problem.blueprint)
            outputs = model(batch[0])
            assert {task: output.numel() for task, output in outputs.items()} == dict.fromkeys(labels, 60)

    @pytest.mark.parametrize("form", TABLES)
    def test_every_form_learns(self, tmp_path, form):
        arguments, _ = TABLES[form](tmp_path)
        found = result_of([*arguments, "--quick"], "hard_sharing", 0.0, 0, tmp_path / "training")
        assert found["macro"]["auc"] > 0.75

    def test_seeds_draw_other_rows_for_all_methods_alike(self, tmp_path):
        arguments, _ = features_table(tmp_path)
        setting, place = setting_and_place(arguments)
        build = own_data_set(place.where).build
        first, again, other = (build(setting.values, place.where, seed) for seed in (0, 0, 1))
        assert torch.equal(first.test.inputs, again.test.inputs)
        assert not torch.equal(first.test.labels, other.test.labels)

    def test_images_are_those_of_the_files(self, tmp_path):
        arguments, _ = image_table(tmp_path)
        setting, place = setting_and_place([*arguments, "--set", "image_size=48"])
        problem = own_data_set(place.where).build(setting.values, place.where, 0)
        assert problem.train.inputs.shape == (180, 3, 48, 48)
        darkest = [float(image.mean()) for image in problem.train.inputs]
        assert max(darkest) > min(darkest)

    def test_images_that_do_not_fit_into_memory_are_read_again(self, tmp_path, monkeypatch):
        from recipes.studies.comparison.data_sets import own_data

        arguments, _ = image_table(tmp_path)
        setting, place = setting_and_place(arguments)
        build = own_data_set(place.where).build
        kept = build(setting.values, place.where, 0).train
        monkeypatch.setattr(own_data, "_IN_MEMORY", 1000)
        read = build(setting.values, place.where, 0).train
        for index in (0, 77, 179):
            assert torch.equal(read[index][0], kept.inputs[index])
            assert torch.equal(read[index][1], kept.labels[index])

    def test_weights_of_a_file(self, tmp_path):
        from recipes.models.small_resnet import SmallResNet

        model = SmallResNet()
        torch.save(model.state_dict(), tmp_path / "weights.pth")
        arguments, _ = image_table(tmp_path)
        setting, place = setting_and_place([*arguments, "--checkpoint-path", str(tmp_path / "weights.pth")])
        problem = own_data_set(place.where).build(setting.values, place.where, 0)
        backbone = problem.blueprint.backbone().eval()
        images = problem.train.inputs[:4]
        with torch.no_grad():
            assert torch.allclose(backbone(images), model.eval().forward_features(images).mean((2, 3)), atol=1e-6)
        assert setting.values["learning_rate"] < 1e-3


class TestPooledEncoder:
    def test_is_the_mean_over_the_tokens(self):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        config = BertConfig(vocab_size=50, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes)
        own = PooledEncoder(config).eval().double()
        ids = torch.randint(1, 50, (3, 6))
        lengths = [6, 2, 4]
        mask = (torch.arange(6) < torch.tensor(lengths).unsqueeze(1)).long()
        with torch.no_grad():
            found = own({"input_ids": ids, "attention_mask": mask})
            for row, length in enumerate(lengths):
                hidden = own.model.encoder(input_ids=ids[row : row + 1, :length]).last_hidden_state[0]
                assert torch.allclose(found[row], hidden.mean(0), atol=1e-12)
        assert own.width == found.shape[1] == 16


class TestMetrics:
    def test_of_one_kind(self):
        assert metrics_of({"a": BINARY, "b": BINARY}) == (("auc", "accuracy", "precision", "recall"), ("auc",))
        assert metrics_of({"a": TaskKind("classes", 3)}) == (("accuracy", "macro_f1"), ("accuracy",))
        assert metrics_of({"a": TaskKind("number")}) == (("nmse", "pearson"), ("nmse",))

    def test_of_several_kinds_the_score_is_compared(self, tmp_path):
        arguments, _ = features_table(tmp_path, mixed=True)
        setting, place = setting_and_place([*arguments, "--set", "epochs=3"])
        found = result_of([*arguments, "--set", "epochs=3"], "hard_sharing", 0.0, 0, tmp_path / "training")
        assert metrics_of(read_rows(place.where).kinds)[1] == (SCORE,)
        kinds = read_rows(place.where).kinds
        by_hand = [
            1 - own["nmse"] if kinds[task].name == "number" else own[kinds[task].score]
            for task, own in found["scores"].items()
        ]
        assert found["macro"][SCORE] == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-5)
        assert found["macro"][SCORE] == pytest.approx(selection_score(found["scores"], kinds), abs=1e-5)
        assert "one minus the nMSE" in introduction(setting.values, place.where)


class TestCommand:
    def test_from_a_table_to_a_verdict(self, tmp_path, capfd, monkeypatch):
        monkeypatch.chdir(tmp_path)
        arguments, _ = features_table(tmp_path, mixed=True)
        command = [*arguments, "--methods", "constant", "hard_sharing", "srdml_default", "--seeds", "3"]
        command += ["--set", "epochs=3", "--workers", "1"]
        assert main([*command, "--minutes", "0"]) == 0
        assert "0 of" in capfd.readouterr().out
        assert main(command) == 0
        printed = capfd.readouterr().out
        assert "12 tasks" in printed
        assert "Each seed draws splits of its own" in printed
        assert "hard sharing in score" in printed
        folder = tmp_path / "runs" / "compare" / "cells"
        assert (folder / "report.html").is_file()
        results = (folder / "results.jsonl").read_text()
        assert str(tmp_path) not in results, "a table that was moved is the same"
        assert main(command) == 0
        assert (folder / "results.jsonl").read_text() == results, "nothing is computed twice"

        (tmp_path / "cells.csv").write_text((tmp_path / "cells.csv").read_text().replace("\n1", "\n2", 1))
        read_rows.cache_clear()
        with pytest.raises(SystemExit):
            main([*command, "--seeds", "4"])
        assert "of other data" in capfd.readouterr().err

    def test_quick_has_few_methods_and_short_trainings(self, tmp_path):
        arguments, _ = features_table(tmp_path)
        quick, whole = (COMMAND.options_of([*arguments, *more]) for more in (["--quick"], []))
        assert "single_task" in quick.methods
        assert len(quick.methods) < 10
        assert whole.methods is None
        assert quick.seeds >= 5, "with fewer there is no verdict"
        assert quick.values["epochs"] < whole.values["epochs"]
        assert COMMAND.options_of([*arguments, "--quick", "--methods", "hard_sharing", "mmoe"]).methods == [
            "hard_sharing",
            "mmoe",
        ]

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            (["--data", "digits"], "--table stands in its place"),
            (["--encoder", "small"], "--encoder: own has none"),
            (["--tasks", "benign"], "only 1 label column"),
            (["--image", "mean_area"], "--image and --features"),
            (["--set", "columns=1"], "with one of activation"),
            (["--pretrained"], "--pretrained: own has no --backbone"),
            (["--checkpoint-path", "x.pth"], "--checkpoint-path: the inputs are no images"),
            (["--images", "folder"], "--images: the inputs are no images"),
            (["--kind", "benign=thing"], "COLUMN=binary"),
        ],
    )
    def test_what_cannot_be(self, tmp_path, capfd, more, said):
        arguments, _ = features_table(tmp_path)
        with pytest.raises(SystemExit):
            main([*arguments, *more])
        assert said in capfd.readouterr().err

    @pytest.mark.parametrize("name", ["--image", "--tasks", "--split-column", "--features"])
    def test_columns_without_a_table(self, capfd, name):
        with pytest.raises(SystemExit):
            main([name, "x"])
        assert "of a --table of your own" in capfd.readouterr().err

    def test_a_backbone_that_there_is_not(self, tmp_path, capfd):
        arguments, _ = image_table(tmp_path)
        with pytest.raises(SystemExit):
            main([*arguments, "--backbone", "resnet19"])
        assert "resnet18" in capfd.readouterr().err
