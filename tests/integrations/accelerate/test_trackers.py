"""Reports in the trackers of Hugging Face accelerate."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saliency_reg import FeatureSurgery, ParameterSurgery, PCGrad, RelationWeights, SaliencyRegularizer
from saliency_reg.errors import CaptureError
from saliency_reg.integrations import accelerate as integration
from saliency_reg.integrations.accelerate import backward, log_report, register
from tests.support.training import TASKS, batch, make_model
from tests.support.two_processes import run_on_two_processes

from .support import fresh_state, losses_of, one_of_two, prepared, steps_with

accelerate: Any = pytest.importorskip("accelerate")
Tracker: Any = pytest.importorskip("accelerate.tracking").GeneralTracker


def tensorboard_run(folder: Path) -> Any:
    pytest.importorskip("tensorboard")
    accelerator = accelerate.Accelerator(cpu=True, log_with="tensorboard", project_dir=str(folder))
    accelerator.init_trackers("run")
    return accelerator


def events_of(folder: Path) -> Any:
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = module.EventAccumulator(str(folder / "run"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events


def pixels_of(encoded: bytes) -> Tensor:
    with pytest.importorskip("PIL.Image").open(io.BytesIO(encoded)) as image:
        return torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).view(
            image.height, image.width, 3
        )


MATRIX = torch.tensor([[0.0, 0.7, 0.2], [0.7, 0.0, 0.1], [0.2, 0.1, 0.0]])


def with_fixed_relations(tasks: tuple[str, ...] = TASKS, **options: Any) -> SaliencyRegularizer:
    size = len(tasks)
    matrix = MATRIX if size == 3 else torch.rand(size, size, generator=torch.Generator().manual_seed(0))
    matrix = (matrix + matrix.T).fill_diagonal_(0)
    relations = RelationWeights(size, "fixed", matrix=matrix)
    return SaliencyRegularizer(None, tasks=tasks, relations=relations, strength=0.5, **{"metric": "l1", **options})


def called(regularizer: SaliencyRegularizer, **options: Any) -> SaliencyRegularizer:
    feature = torch.ones(4, 2, requires_grad=True)
    outputs = {task: (index + 1) / 2 * feature.square().sum(1) for index, task in enumerate(regularizer.tasks)}
    regularizer(outputs=outputs, features=feature, **options)
    return regularizer


def test_scalars_in_tensorboard(tmp_path: Path) -> None:
    accelerator = tensorboard_run(tmp_path)
    model, optimizer, regularizer, _ = prepared(accelerator, "before prepare", wrapped=True, surgery=PCGrad())
    sent = []
    for step in range(3):
        steps_with(accelerator, model, optimizer, regularizer, range(step, step + 1))
        sent.append(log_report(regularizer, accelerator, step, image_every=None))
    report = regularizer.report
    assert report is not None
    assert report.surgery is not None
    accelerator.end_training()
    events = events_of(tmp_path)
    assert not events.Tags()["images"]
    assert set(events.Tags()["scalars"]) == set(sent[-1])
    for name in sent[-1]:
        assert [event.step for event in events.Scalars(name)] == [0, 1, 2]
        assert [event.value for event in events.Scalars(name)] == pytest.approx([one[name] for one in sent])
    pairs = [float(report.distances[i, j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    weights = [float(report.relations[i, j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert sent[-1] == pytest.approx(
        {
            "saliency/penalty": float(report.penalty),
            "saliency/share": report.share,
            "saliency/strength": 0.5,
            "saliency/distance_mean": sum(pairs) / 3,
            "saliency/relation_mean": 1 / 3,
            "saliency/relation_max": max(weights),
            "saliency/relation_min": min(weights),
            "saliency/distance/left-right": pairs[0],
            "saliency/distance/left-up": pairs[1],
            "saliency/distance/right-up": pairs[2],
            "saliency/relation/left-right": weights[0],
            "saliency/relation/left-up": weights[1],
            "saliency/relation/right-up": weights[2],
            "saliency/surgery/conflicts": report.surgery.conflicts,
            **{
                f"saliency/surgery/weight/{task}": weight
                for task, weight in zip(TASKS, report.surgery.weights.tolist())
            },
        }
    )


def test_the_matrix_is_an_image_in_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    accelerator = tensorboard_run(tmp_path)
    log_report(called(with_fixed_relations()), accelerator, 3)
    accelerator.end_training()
    events = events_of(tmp_path)
    assert events.Tags()["images"] == ["saliency/relations"]
    (event,) = events.Images("saliency/relations")
    assert event.step == 3
    image = pixels_of(event.encoded_image_string)
    assert image.shape == (3 * 64, 3 * 64, 3)
    cells = image.view(3, 64, 3, 64, 3).permute(0, 2, 1, 3, 4).reshape(3, 3, 64 * 64, 3)
    assert (cells == cells[:, :, :1]).all()  # one colour a cell
    brightness = cells[:, :, 0].float().mean(-1)
    assert brightness[0, 1] > brightness[0, 2] > brightness[1, 2]
    assert torch.equal(brightness, brightness.T)
    grey = cells.diagonal()[0]
    assert (grey == grey[:1]).all()
    assert len(set(cells[0, 0, 0].tolist())) == 1


def test_the_image_with_names(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    accelerator = tensorboard_run(tmp_path)
    tasks = ("left", "a name that is far too long for the margin of a picture", "$\\no mathematics$ \u4e16")
    log_report(called(with_fixed_relations(tasks)), accelerator, 0)
    accelerator.end_training()
    (event,) = events_of(tmp_path).Images("saliency/relations")
    image = pixels_of(event.encoded_image_string)
    assert min(image.shape[:2]) >= 300
    colours, counts = image.view(-1, 3).unique(dim=0, return_counts=True)
    cells = [tuple(colour) for colour in colours[counts.argsort(descending=True)].tolist()]
    bright, grey = (253, 231, 36), (211, 211, 211)  # of the largest relation, and of no relation
    assert bright in cells[:6]
    assert grey in cells[:6]
    where = (image == torch.tensor(bright)).all(-1).nonzero().float()
    off = (image == torch.tensor(grey)).all(-1).nonzero().float()
    assert len(where) > 2 * 20**2
    assert len(off) / len(where) == pytest.approx(3 / 2, rel=0.1)
    row, column = (where.mean(0) - off.mean(0)).tolist()
    assert row < -10  # both cells of the pair (0, 1) are above and left of the middle of the diagonal
    assert column < -10


def test_names_in_the_picture_cost_no_matplotlib_state() -> None:
    """No backend is chosen, and no figure is left open."""
    pytest.importorskip("matplotlib")
    code = (
        "import sys, torch; from saliency_reg import SaliencyRegularizer; "
        "from saliency_reg.integrations import accelerate; from saliency_reg.integrations.shared import relation_image; "
        "assert not {'accelerate', 'matplotlib', 'tensorboard'} & set(sys.modules), 'import'; "
        "r = SaliencyRegularizer(None, tasks=['a', 'b'], strength=1); f = torch.ones(4, 2, requires_grad=True); "
        "r(outputs={'a': f.sum(1), 'b': 2 * f.sum(1)}, features=f); "
        "print(relation_image.image_of(r.report).shape, 'matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(350, 400, 3) False"


class Recorder(Tracker):
    """Somebody's own tracker, which takes images as those of accelerate do."""

    requires_logging_directory = False
    tracker = None

    def __init__(self, name: str = "recorder") -> None:
        self.name = name
        super().__init__()
        self.scalars: list[tuple[int, dict[str, float]]] = []
        self.images: list[tuple[int, dict[str, Any]]] = []

    def log(self, values: dict[str, float], step: int | None = None, **options: Any) -> None:
        self.scalars.append((step, values))

    def log_images(self, values: dict[str, Any], step: int | None = None) -> None:
        self.images.append((step, values))


class Scalars(Tracker):
    """One that takes no images."""

    name, requires_logging_directory, tracker = "scalars", False, None

    def log(self, values: dict[str, float], step: int | None = None, **options: Any) -> None:
        assert all(isinstance(value, float) for value in values.values())


def recording(*trackers: Any) -> Any:
    accelerator = accelerate.Accelerator(cpu=True, log_with=list(trackers))
    accelerator.init_trackers("run")
    return accelerator


def test_images_go_out_from_time_to_time() -> None:
    recorder = Recorder()
    accelerator = recording(recorder, Scalars())
    regularizer = called(with_fixed_relations())
    for step in (7, 8, 16, 17, 18, 40, 5, 6):
        log_report(regularizer, accelerator, step, image_every=10)
    assert [step for step, _ in recorder.images] == [7, 17, 40, 5]  # 5: the run was started anew
    assert [step for step, _ in recorder.scalars] == [7, 8, 16, 17, 18, 40, 5, 6]
    log_report(called(with_fixed_relations()), accelerator, 6)
    assert recorder.images[-1][0] == 6  # each regularizer has its own
    ((name, (image,)),) = recorder.images[-1][1].items()
    assert name == "saliency/relations"
    assert image.dtype.name == "uint8"
    assert image.shape[2] == 3


def test_trackers_that_take_a_single_image() -> None:
    trackers = [Recorder("aim"), Recorder("clearml"), Recorder("wandb")]
    log_report(called(with_fixed_relations()), recording(*trackers), 0, prefix="faces")
    shapes = [[getattr(value, "shape", len(value)) for value in one.images[0][1].values()] for one in trackers]
    assert len(shapes[0][0]) == len(shapes[1][0]) == 3
    assert shapes[2] == [1]
    assert "faces/penalty" in trackers[0].scalars[0][1]


def test_the_image_of_many_tasks() -> None:
    recorder = Recorder()
    tasks = tuple(f"attribute {index}" for index in range(40))
    log_report(called(with_fixed_relations(tasks)), recording(recorder), 0)
    (image,) = recorder.images[0][1]["saliency/relations"]
    assert 480 <= max(image.shape) <= 2000


def test_a_limit_of_pairs() -> None:
    recorder = Recorder()
    accelerator = recording(recorder)
    regularizer = called(with_fixed_relations())

    def pairs(**options: Any) -> list[str]:
        sent = log_report(regularizer, accelerator, 0, **options)
        return [name.rpartition("/")[2] for name in sent if name.startswith("saliency/relation/")]

    assert pairs(max_pairs=2) == ["left-right", "left-up"]  # the largest relations
    assert pairs(max_pairs=0) == []
    many = called(with_fixed_relations(tuple(f"task {index}" for index in range(12))))
    sent = log_report(many, accelerator, 0)
    assert sum(name.startswith("saliency/distance/") for name in sent) == 50
    strongest = many.relations.matrix().argmax()
    first = f"saliency/relation/task_{strongest // 12}-task_{strongest % 12}"
    assert sent[first] == sent["saliency/relation_max"]


def test_names_that_trackers_do_not_take() -> None:
    def pairs(*tasks: str) -> list[str]:
        with fresh_state():
            sent = log_report(called(with_fixed_relations(tasks)), recording(Recorder()), 0)
        return sorted(name for name in sent if name.startswith("saliency/distance/"))

    assert pairs("face/smiling", "look: young?", "5_o_Clock") == [
        "saliency/distance/face_smiling-5_o_Clock",
        "saliency/distance/face_smiling-look_young_",
        "saliency/distance/look_young_-5_o_Clock",
    ]
    assert len(set(pairs("a b", "a_b", "a/b"))) == 3
    assert len(set(pairs("a-b", "c", "a"))) == 3
    assert len(set(pairs("a", "b-a", "a-b"))) == 3


def test_values_that_are_not_finite_are_left_out() -> None:
    recorder = Recorder()
    accelerator = recording(recorder)
    model, _ = make_model()
    regularizer = SaliencyRegularizer(model, "heads", strength=1.0, metric="l1")
    feature = model.backbone(batch(0)[0])
    for task in ("left", "up"):
        model.heads[task](feature)
    regularizer(losses=torch.zeros(()))
    sent = log_report(regularizer, accelerator, 0)
    assert "saliency/distance/left-up" in sent
    assert not {"saliency/distance/left-right", "saliency/share"} & set(sent)  # did not run; infinite
    assert sent["saliency/distance_mean"] == sent["saliency/distance/left-up"]
    bad = torch.full((16, 6), float("nan"))
    model(bad)
    regularizer()
    sent = log_report(regularizer, accelerator, 1, image_every=1)
    assert "saliency/penalty" not in sent
    assert sent["saliency/strength"] == 1.0
    assert all(torch.isfinite(torch.tensor(list(values.values()))).all() for _, values in recorder.scalars)
    assert len(recorder.images) == 2


@pytest.mark.parametrize("kind", ["feature", "parameters"])
def test_figures_of_surgery_alone(kind: str) -> None:
    recorder = Recorder()
    accelerator = recording(recorder)
    model, optimizer = make_model()
    surgery = FeatureSurgery(model, "heads") if kind == "feature" else ParameterSurgery(model, shared="backbone")
    register(surgery, accelerator, optimizer=optimizer)
    with pytest.raises(CaptureError, match="has no report yet"):
        log_report(surgery, accelerator, 0)
    x, y = batch(0)
    losses = losses_of(model(x), y)
    if kind == "feature":
        accelerator.backward(sum(losses.values()))
    else:
        backward(surgery, accelerator, losses)
    sent = log_report(surgery, accelerator, 0)
    assert set(sent) == {"saliency/surgery/conflicts", *(f"saliency/surgery/weight/{task}" for task in TASKS)}
    assert not recorder.images


def test_without_a_tracker_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "figures_of", None)
    monkeypatch.setattr(integration, "_send_image", None)
    assert log_report(called(with_fixed_relations()), accelerate.Accelerator(cpu=True), 0) == {}


def log_on(rank: int, folder: str) -> dict[str, Any]:
    pytest.importorskip("tensorboard")
    own = Path(folder) / str(rank)
    with one_of_two(rank, log_with="tensorboard", project_dir=str(own)) as accelerator:
        accelerator.init_trackers("run")
        if rank:
            read, integration.figures_of = integration.figures_of, None
        try:
            model, optimizer, regularizer, _ = prepared(accelerator, "before prepare", wrapped=True)
            steps_with(accelerator, model, optimizer, regularizer, range(2), shift=10 * rank)
            sent = log_report(regularizer, accelerator, 1)
        finally:
            if rank:
                integration.figures_of = read
        for tracker in accelerator.trackers:
            tracker.finish()
        return {"sent": sent, "files": sorted(path.name for path in own.rglob("*") if path.is_file())}


def test_only_one_process_reads_and_writes(tmp_path: Path) -> None:
    first, second = run_on_two_processes(log_on, str(tmp_path))
    assert second == {"sent": {}, "files": []}
    assert len(first["files"]) == 1
    events = events_of(tmp_path / "0")
    assert set(events.Tags()["scalars"]) == set(first["sent"])
    assert events.Tags()["images"] == ["saliency/relations"]
