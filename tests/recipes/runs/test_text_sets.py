"""Several sets of texts with a task each, run for real on small files of the hub's schema."""

import contextlib
import io
import json
import random
from collections import Counter

import pytest
import torch

from recipes import text_sets
from recipes.data.task_kinds import TaskKind
from recipes.data.texts.task_batches import SetExamples, TaskBatches
from recipes.data.texts.text_sets import read_set
from recipes.runs import by_trainer, shell
from recipes.runs.text_set_run import validation_metrics
from recipes.runtime.errors import need
from recipes.runtime.run_folder import INTERRUPTED
from recipes.runtime.termination import TERMINATED
from recipes.training.metrics import task_scores
from saliency_reg.integrations.plot import draw_relations, draw_task_tree
from saliency_reg.integrations.transformers import MultiTaskModel

datasets, transformers = need("datasets"), need("transformers")

pytestmark = pytest.mark.usefixtures("quiet_hub")

SMALL = ("--width", "8", "--layers", "1", "--vocabulary", "100")
QUICK = ("--head-width", "8", "--batch-size", "10", "--epochs", "2", "--evaluations", "4")
SIZES = {"train": 100, "validation": 40, "test": 40}
GOOD, BAD = ("good", "great", "fine", "lovely"), ("bad", "awful", "poor", "ugly")
OTHER = ("the", "film", "plot", "was", "very")


def text(is_good, draw):
    return " ".join([*draw.choices(GOOD if is_good else BAD, k=2), *draw.choices(OTHER, k=draw.randint(1, 4))])


def opinions(rows, draw):
    return [{"sentence": text(row % 2, draw), "label": row % 2, "idx": row} for row in range(rows)]


def write_opinions(folder, splits, names=("negative", "positive")):
    """As ``datasets`` writes it, with the names of the classes."""
    features = datasets.Features(
        {
            "sentence": datasets.Value("string"),
            "label": datasets.ClassLabel(names=list(names)),
            "idx": datasets.Value("int32"),
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        whole = datasets.Dataset.from_list(rows, features=features)
        whole.to_parquet(folder / f"{split}-00000-of-00001.parquet")


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Without pictures, which would take longer than the trainings."""
    # Tells the hub of each file that is read; where there is no network, that takes seconds.
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False, raising=False)
    monkeypatch.setattr(shell, "draw_relations", write_nothing)
    monkeypatch.setattr(shell, "draw_task_tree", write_nothing)


def write_nothing(relations, tasks, path, title):
    path.touch()


def scores_of(kind, outputs, labels):
    return task_scores(outputs, labels.unsqueeze(1), {"task": kind})["task"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """``--set`` of two classifications and a regression, in three formats."""
    tmp_path = tmp_path_factory.mktemp("sets")
    draw = random.Random(0)
    write_opinions(tmp_path / "opinions", {split: opinions(rows, draw) for split, rows in SIZES.items()})
    lines, table = [], ["sentence1,sentence2,label"]
    for split, rows in SIZES.items():
        for row in range(rows // 2):
            premise, hypothesis = row % 2, row // 2 % 2
            pair = {"premise": text(premise, draw), "hypothesis": text(hypothesis, draw)}
            lines.append({**pair, "label": premise + hypothesis, "split": split})
    write_lines(tmp_path / "pairs.jsonl", lines)
    (tmp_path / "alike").mkdir()
    for split, rows in SIZES.items():
        own = [
            f"{text(row % 2, draw)},{text(row // 2 % 2, draw)},{4.0 * (row % 2 == row // 2 % 2) + draw.random():.2f}"
            for row in range(rows * 7 // 10)
        ]
        (tmp_path / "alike" / f"{split}.csv").write_text("\n".join([*table, *own]) + "\n", encoding="utf-8")
    return {"opinions": tmp_path / "opinions", "pairs": tmp_path / "pairs.jsonl", "alike": tmp_path / "alike"}


def command(sources, out, *arguments, small=SMALL):
    given = [part for name, source in sources.items() for part in ("--set", f"{name}={source}")]
    return [*given, *QUICK, *small, "--out", str(out), "--name", "one", *arguments]


def run(sources, out, *arguments, small=SMALL):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = text_sets.main(command(sources, out, *arguments, small=small))
    return code, printed.getvalue()


def read(out):
    return json.loads((out / "one" / "results.json").read_text(encoding="utf-8"))


def figures(out):
    """What has to be the same of two runs, down to the last bit."""
    content = read(out)
    weights = (out / "one" / "model" / "model.safetensors").read_bytes()
    return [content[name] for name in ("scores", "relations", "validation", "chosen_step", "steps")], weights


def error_of(capsys):
    line = capsys.readouterr().err.splitlines()[-1]
    prefix = "python -m recipes.text_sets: error: "
    assert line.startswith(prefix)
    return line.removeprefix(prefix)


def test_a_run_ends_with_the_table_and_files(sources, tmp_path, monkeypatch):
    for draw in (draw_relations, draw_task_tree):
        monkeypatch.setattr(shell, draw.__name__, draw)
    code, printed = run(sources, tmp_path, "--accumulation", "2")
    assert code == 0
    lines = printed.splitlines()
    assert lines[:4] == [
        "opinions (2 classes): 100 train, 40 validation, 40 test texts; sentence -> label; 9 batches in an epoch.",
        "pairs (3 classes): 50 train, 20 validation, 20 test texts; premise + hypothesis -> label; 6 batches in an epoch.",
        "alike (number): 70 train, 28 validation, 28 test texts; sentence1 + sentence2 -> label; 7 batches in an epoch.",
        "SRDML on small.",
    ]
    assert ["task", "split", "texts", "accuracy", "macro", "F1", "nMSE", "Pearson"] in [line.split() for line in lines]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        ".lock",
        "model",
        "relations.png",
        "results.json",
        "task_tree.png",
    ]
    content = read(tmp_path)
    assert content["status"] == "complete"
    assert content["steps"] == 22
    assert {task: sorted(own) for task, own in content["scores"].items()} == {
        "opinions": ["accuracy", "macro_f1"],
        "pairs": ["accuracy", "macro_f1"],
        "alike": ["nmse", "pearson"],
    }
    assert content["sets"]["opinions"]["classes"] == ["negative", "positive"]
    assert {"torch", "transformers", "datasets"} <= set(content["versions"])
    best = max(content["validation"], key=lambda entry: entry["eval_score"])
    assert content["chosen_step"] == best["step"]
    assert torch.tensor(content["relations"]).triu(1).sum() == pytest.approx(1)

    model = MultiTaskModel.from_pretrained(tmp_path / "one" / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "one" / "model")
    own = read_set("alike", str(sources["alike"]))
    test = own.splits["test"]
    batch = tokenizer(list(test.texts), list(test.pairs), padding=True, return_tensors="pt")
    assert batch["token_type_ids"].any()
    with torch.no_grad():
        found = scores_of(own.kind, model(**batch).logits["alike"].unsqueeze(1), test.labels)
    assert content["scores"]["alike"] == pytest.approx(found, rel=1e-4)
    assert run(sources, tmp_path, "--accumulation", "2", "--resume", "auto")[1].endswith("to train again.\n")


RESUMED = ("--accumulation", "2", "--method", "srdml_pcgrad")


@pytest.fixture(scope="module")
def uninterrupted(sources, tmp_path_factory):
    """What a run ends with that nothing stops."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patched:
        for name in ("draw_relations", "draw_task_tree"):
            patched.setattr(shell, name, write_nothing)
        assert run(sources, out, *RESUMED)[0] == 0
    return figures(out)


@pytest.mark.parametrize("stops_at", [7, 11, 15])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(sources, uninterrupted, tmp_path, monkeypatch, stops_at):
    """Bit for bit, with dropout; an epoch has 11 steps, and at 6, 12 and 18 there are evaluations."""
    calls: Counter[str] = Counter()

    @contextlib.contextmanager
    def stopping():
        def stops():
            calls["steps"] += 1
            if calls["steps"] == stops_at and stops_at == 15:
                raise KeyboardInterrupt  # nothing is saved: the checkpoint of step 12 is the latest
            return calls["steps"] == stops_at

        yield stops

    with monkeypatch.context() as patched:
        patched.setattr(by_trainer, "deferred", stopping)
        code, printed = run(sources, tmp_path, *RESUMED)
    assert code == (INTERRUPTED if stops_at == 15 else TERMINATED)
    assert "--resume auto" in printed
    checkpoints = tmp_path / "one" / "checkpoints"
    if stops_at == 15:  # what a killed write leaves
        (checkpoints / "checkpoint-14").mkdir()
        (checkpoints / "checkpoint-14" / "trainer_state.json").write_text('{"global_', encoding="utf-8")
    assert read(tmp_path)["status"] == "running"
    code, printed = run(sources, tmp_path, *RESUMED, "--resume", "auto")
    assert code == 0
    assert "step 6 of 22" not in printed
    assert figures(tmp_path) == uninterrupted


def test_surgery_at_the_feature_changes_nothing_with_one_label_per_text(sources, tmp_path):
    for method in ("hard_sharing", "pcgrad"):
        assert run(sources, tmp_path / method, "--method", method, "--epochs", "1")[0] == 0
    one, other = read(tmp_path / "hard_sharing"), read(tmp_path / "pcgrad")
    for task, scores in one["scores"].items():
        assert other["scores"][task] == pytest.approx(scores, rel=1e-3)
    # Those of hard sharing are only watched, and are there all the same.
    torch.testing.assert_close(*(torch.tensor(content["relations"]) for content in (one, other)), rtol=1e-3, atol=0)


def test_without_test_labels_the_last_step_is_taken(sources, tmp_path, monkeypatch):
    """As GLUE is published: -1 in place of the test labels."""
    draw = random.Random(0)
    hidden = [{**row, "label": -1} for row in opinions(20, draw)]
    write_opinions(tmp_path / "glue", {"train": opinions(40, draw), "validation": opinions(20, draw), "test": hidden})
    whole = datasets.load_dataset("parquet", data_dir=str(tmp_path / "glue"))
    real, asked = datasets.load_dataset, []

    def load_dataset(name, *arguments, **options):
        if name != "nyu-mll/glue":
            return real(name, *arguments, **options)
        asked.append(arguments)
        return whole

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    code, printed = run({**sources, "glue": "nyu-mll/glue:sst2"}, tmp_path, "--epochs", "1")
    assert code == 0
    assert asked == [("sst2",)]
    assert "glue (2 classes): 40 train, 20 validation texts;" in printed
    assert "No labels in: test." in printed
    assert "Weights of the last step: glue has not both a validation and a test split with labels." in printed
    content = read(tmp_path)
    assert content["sets"]["glue"]["reported"] == "validation"
    assert content["chosen_step"] == content["steps"]
    last = content["validation"][-1]
    assert last["step"] == content["steps"]
    assert last["eval_glue_accuracy"] == content["scores"]["glue"]["accuracy"]


@pytest.fixture
def encoder(tmp_path):
    """A folder with a tiny BERT that knows 18 tokens and 9 positions, without a tokenizer."""
    config = transformers.BertConfig(
        vocab_size=18,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=9,
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


WORDS = (*GOOD, *BAD, *OTHER)


def write_tokenizer(folder, words):
    vocabulary = {word: number for number, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words))}
    transformers.BertTokenizer(vocabulary).save_pretrained(folder)


def test_an_encoder_of_a_folder(sources, encoder, tmp_path):
    write_tokenizer(encoder, WORDS)
    code, printed = run(sources, tmp_path, "--encoder", str(encoder), "--max-length", "9", "--epochs", "1", small=())
    assert code == 0
    assert f"SRDML on {encoder}." in printed
    assert read(tmp_path)["options"]["encoder"] == str(encoder)


def test_tokenizer_and_encoder_that_do_not_fit(sources, encoder, tmp_path, capsys):
    arguments = ("--encoder", str(encoder), "--max-length", "9")
    assert run(sources, tmp_path, *arguments, small=())[0] == 1
    assert "100 % of the tokens of these texts are unknown to" in error_of(capsys)
    assert run(sources, tmp_path, *arguments, "--tokenizer", "./nowhere", small=())[0] == 1
    assert error_of(capsys).startswith("no tokenizer could be loaded from ./nowhere (")
    write_tokenizer(encoder, ("more", *WORDS))
    assert run(sources, tmp_path, *arguments, small=())[0] == 1
    assert error_of(capsys).startswith("input_ids go from 0 to 18, but BertModel has embeddings for 0 to 17.")
    write_tokenizer(encoder, WORDS)
    assert run(sources, tmp_path, "--encoder", str(encoder), small=())[0] == 1
    assert error_of(capsys).endswith("Pass a smaller --max-length.")
    assert not (tmp_path / "one").exists()


def broken(sources, tmp_path, train, validation=None, test=None):
    """The sets, with another one of these rows."""
    draw = random.Random(0)
    splits = {"train": train, "validation": validation or opinions(8, draw), **({"test": test} if test else {})}
    for split, rows in splits.items():
        if rows:
            write_lines(tmp_path / "own" / f"{split}.jsonl", rows)
    return {**sources, "own": tmp_path / "own"}


ROWS = opinions(10, random.Random(1))


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ((ROWS,), ("--columns", "own=sentense,label"), "has no column 'sentense'. Did you mean 'sentence'?"),
        (
            ([{"a": "x", "b": 1}, {"a": "y", "b": 0}],),
            (),
            "the columns a, b, and none with a common name of texts. Use",
        ),
        (
            ([{"text": "x", "b": 1}, {"text": "y", "b": 0}],),
            (),
            "none with a common name of labels. Use --columns own=",
        ),
        (([],), (), "found no training split in"),
        (([{**row, "label": 1} for row in ROWS],), (), "are all 1, so there is nothing to learn."),
        (([{**row, "label": 1.5} for row in ROWS],), (), "are the same, so there is nothing to learn."),
        ((ROWS, ROWS, [{**ROWS[0], "label": 2}]), (), "row 0 of the test split of"),
        (
            (ROWS, ROWS, [{**ROWS[0], "label": "good"}]),
            (),
            "has the label 'good', which is none of the training split's",
        ),
        (([*ROWS, {**ROWS[0], "sentence": " "}],), (), "has no text. Use --skip-incomplete"),
        (([*ROWS, {**ROWS[0], "label": None}],), (), "has no label. Use --skip-incomplete"),
        (([*ROWS, {**ROWS[0], "label": -1}],), (), "has no label. Use --skip-incomplete"),
        ((ROWS,), ("--columns", "own=idx,label"), "row 0 of the train split of"),
        ((ROWS, [{"text": "x", "label": 0}]), (), "the validation split of"),
        (([{**row, "label": [1]} for row in ROWS],), (), "are of the kind list, expected a number or a text"),
    ],
)
def test_bad_data(sources, tmp_path, capsys, rows, arguments, message):
    given = broken(sources, tmp_path, *rows)
    assert run(given, tmp_path, *arguments)[0] == 1
    assert message in error_of(capsys)
    assert not (tmp_path / "one").exists()


def test_bad_sources(sources, tmp_path, capsys, monkeypatch):
    def error(source):
        assert run({**sources, "own": source}, tmp_path)[0] == 1
        return error_of(capsys)

    assert "found no folder and no file ./nowhere" in error("./nowhere")
    (tmp_path / "own.csv").write_text("text,label\nx,1\n")
    assert "nothing says which rows are for training. Add a column 'split'" in error(tmp_path / "own.csv")
    (tmp_path / "own.csv").write_text("text,label,split\nx,1,everything\n")
    assert "row 0 of" in error(tmp_path / "own.csv")
    (tmp_path / "own.csv").write_text("text,label,split\nx,1,train\ny,0,train\n")
    assert "no labelled validation or test split" in error(tmp_path / "own.csv")
    (tmp_path / "own.xlsx").write_text("")
    assert "ends in .xlsx, expected one of .parquet" in error(tmp_path / "own.xlsx")
    (tmp_path / "own.parquet").write_text("text")
    assert "cannot be read (" in error(tmp_path / "own.parquet")

    def unreachable(*arguments, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    given = {"own": "nyu-mll/glue:sst3", "other": "nyu-mll/glue:sst2"}
    assert run(given, tmp_path)[0] == 1
    assert "could not be loaded from the hub (ConnectionError: no network). Use OWNER/NAME" in error_of(capsys)


@pytest.mark.parametrize(
    ("names", "arguments", "message"),
    [
        (["opinions"], (), "argument --set: found 1, and relations need two."),
        (["opinions", "pairs"], ("--set", "pairs=x"), "found pairs more than once"),
        (["opinions", "pairs"], ("--set", "pairs"), "Pass NAME=SOURCE"),
        (["opinions", "pairs"], ("--columns", "pears=a,b"), "found pears, which is no set"),
        (["opinions", "pairs"], ("--columns", "pairs=a"), "Pass NAME=TEXT,LABEL"),
        (["opinions", "pairs"], ("--method", "pcgrad", "--strength", "1"), "pcgrad has no penalty"),
        (["opinions", "pairs"], ("--method", "mgda_ub"), "this recipe has no mgda_ub. Use one of hard_sharing, srdml,"),
        (
            ["opinions", "pairs"],
            ("--method", "mgda"),
            "found 'mgda'. Did you mean mgda_ub? Use one of hard_sharing, single_task",
        ),
        (
            ["opinions", "pairs"],
            ("--encoder", "bert-base-uncased"),
            "argument --width: only the encoder 'small' has it",
        ),
        (["opinions", "pairs"], ("--tokenizer", "x"), "argument --tokenizer"),
        (["opinions", "pairs"], ("--resume", "auto", "--batch-size", "11"), "had --batch-size 10, but found 11"),
        (["opinions", "pairs"], ("--resume", "auto"), "was begun with other data"),
    ],
)
def test_bad_options(sources, tmp_path, capsys, names, arguments, message):
    chosen = {name: sources[name] for name in names}
    if "--resume" in arguments:
        parsed = vars(text_sets._parser().parse_args(command(chosen, tmp_path)))
        options = {name: value for name, value in parsed.items() if name not in ("out", "name", "resume")}
        before = {"recipe": "text_sets", "schema_version": 1, "options": options, "fingerprint": "other"}
        (tmp_path / "one").mkdir()
        (tmp_path / "one" / "results.json").write_text(json.dumps(before), encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        run(chosen, tmp_path, *arguments)
    assert stop.value.code == 2
    assert message in error_of(capsys)


def test_incomplete_rows_can_be_left_out(tmp_path):
    rows = [*ROWS, {**ROWS[0], "sentence": ""}, {**ROWS[0], "label": -1}, {**ROWS[0], "label": None}]
    write_lines(tmp_path / "train.jsonl", rows)
    write_lines(tmp_path / "dev.jsonl", ROWS[:4])
    found = read_set("own", str(tmp_path), skip=True)
    assert found.left_out == 3
    assert found.kind == TaskKind("classes", 2)
    assert found.splits["train"].texts == tuple(row["sentence"] for row in ROWS)
    assert found.splits["validation"].labels.tolist() == [0, 1, 0, 1]


def test_classes_and_numbers(tmp_path):
    def found(*labels):
        write_lines(tmp_path / "train.jsonl", [{"text": f"text {label}", "label": label} for label in labels])
        write_lines(tmp_path / "validation.jsonl", [{"text": "some", "label": labels[0]}])
        own = read_set("own", str(tmp_path))
        return own.kind.name, own.classes, own.splits["train"].labels.tolist()

    assert found("no", "yes", "maybe") == ("classes", ("maybe", "no", "yes"), [1, 2, 0])
    assert found(5, 1, 3) == ("classes", ("1", "3", "5"), [2, 0, 1])
    assert found(True, False) == ("classes", ("False", "True"), [1, 0])
    assert found(5.0, 1.0, 3.0) == ("number", (), [5, 1, 3])
    kind = read_set("own", str(tmp_path)).kind
    assert (kind.mean, kind.spread) == (3, 2)
    (tmp_path / "train.csv").write_text("text,label\nnull,1\nNA,0\n")  # texts, and not missing ones
    (tmp_path / "train.jsonl").unlink()
    write_lines(tmp_path / "validation.jsonl", [{"text": "some", "label": 1}])
    assert read_set("own", str(tmp_path)).splits["train"].texts == ("null", "NA")


@pytest.mark.parametrize(
    ("exponent", "quotas"), [(1, [100, 10, 1]), (0.5, [78, 25, 8]), (0, [37, 37, 37]), (3, [110, 1, 1])]
)
def test_shares_of_the_tasks(exponent, quotas):
    batches = TaskBatches((1000, 100, 10), 10, exponent, seed=0)
    assert batches.quotas == quotas
    assert len(list(batches)) == len(batches) == sum(quotas)


def test_batches_are_of_one_task_and_go_through_all_rows():
    sizes = (23, 7, 50)
    batches = TaskBatches(sizes, 4, 0.5, seed=3)
    ends = (23, 30, 80)
    seen: dict[int, list[int]] = {task: [] for task in range(3)}
    orders = []
    for epoch in range(6):
        batches.set_epoch(epoch)
        order = []
        for batch in batches:
            (task,) = {sum(row >= end for end in ends) for row in batch}
            seen[task] += batch
            order.append(task)
        assert Counter(order) == dict(enumerate(batches.quotas))
        orders.append(order)
    assert len({tuple(order) for order in orders}) == 6
    for task, (size, end) in enumerate(zip(sizes, ends)):
        for start in range(0, len(seen[task]) - size + 1, size):
            assert sorted(seen[task][start : start + size]) == list(range(end - size, end))
        assert seen[task][:size] != seen[task][size : 2 * size]


def test_batches_depend_on_seed_and_epoch_alone():
    def epoch(number, seed=0, before=()):
        batches = TaskBatches((23, 7, 50), 4, 0.5, seed)
        for other in before:
            batches.set_epoch(other)
            list(batches)
        batches.set_epoch(number)
        torch.rand(3)
        return list(batches)

    assert epoch(2) == epoch(2, before=(0, 1)) == epoch(2, before=(5,))
    assert epoch(2) != epoch(3)
    assert epoch(2) != epoch(2, seed=1)


def test_examples_have_the_label_of_their_task():
    examples = SetExamples({"a": [{"input_ids": [1]}], "b": [{"input_ids": [2]}]}, {"a": [0], "b": [0.5]})
    assert [examples[row] for row in range(len(examples))] == [
        {"input_ids": [1], "labels": {"a": 0}},
        {"input_ids": [2], "labels": {"b": 0.5}},
    ]


def test_scores():
    classes = TaskKind("classes", 3)
    logits = torch.eye(3)[[0, 0, 1, 1]]
    found = scores_of(classes, logits, torch.tensor([0.0, 1.0, 1.0, 1.0]))
    assert found == {"accuracy": 0.75, "macro_f1": pytest.approx((2 / 3 + 4 / 5) / 2)}
    number = TaskKind("number", mean=3.0, spread=2.0)
    labels = torch.tensor([1.0, 3.0, 5.0])
    assert scores_of(number, torch.tensor([[-0.5], [0.0], [0.5]]), labels) == pytest.approx(
        {"nmse": 1 / 6, "pearson": 1.0}
    )
    constant = scores_of(number, torch.zeros(3, 1), labels)
    assert constant == pytest.approx({"nmse": 2 / 3, "pearson": float("nan")}, nan_ok=True)
    kinds = {"a": classes, "b": number}
    assert validation_metrics({"a": found, "b": constant}, kinds)["eval_score"] == pytest.approx((0.75 + 1 / 3) / 2)
    diverged = scores_of(classes, torch.full((4, 3), torch.nan), torch.zeros(4))
    assert diverged == pytest.approx({"accuracy": float("nan"), "macro_f1": float("nan")}, nan_ok=True)
    assert validation_metrics({"a": diverged, "b": constant}, kinds)["eval_score"] == -float("inf")
