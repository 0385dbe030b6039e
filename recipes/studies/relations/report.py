"""What the door of relations leaves: an answer, a page, pictures, and files for other tools."""

from __future__ import annotations

import base64
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from saliency_reg import RelationViews
from saliency_reg.integrations.plot import draw_view_graph, draw_view_tree, draw_views

from ...runtime.errors import need
from ...runtime.files import write_text
from ...runtime.tables import duration_text
from ..page import Origin
from ..study import Study
from ..tables import markdown_table
from ..written import OF_PICTURES, Written, attempt
from .findings import NOISE, WITHOUT_COMMON_LABELS, Findings, findings, label_of, rank_rows

_PAIRS = 5
#: Of more labels no tree or heat map can be read.
_MOST_PICTURED = 60
_READING = (
    "Gathered from the batches of hard sharing with a SaliencyRegularizer as it is by default, as running means over the "
    "latest hundred steps, and kept from the look with the least validation loss: on samples that a model knows by heart "
    "all labels are easy, and errors and TAG say nothing.",
    "Saliency distance and relation weights compare how outputs depend on the features, by the angle between saliencies "
    "(cosine) and not by their size, which is small for rare labels. They need no labels in common.",
    "Gradient cosine and TAG are taken at the feature map, sample by sample: they know nothing of two labels that no sample "
    "has together (grey). Labels that exclude each other are opposed by them, the more the harder they are to tell apart; "
    "rare ones are close, since the model says no to all of them.",
    "Error co-occurrence is high for any two rare labels, which are easy on nearly all samples; the chance-corrected one is "
    "not.",
    "Label correlation is that of the labels, without a model. Labels that exclude each other have a negative one, however "
    "alike they look.",
)


@dataclass(frozen=True)
class RelationsReport:
    """The report of one command line.

    Attributes:
        view: of which groups are made; by default it is chosen.
        groups: how many; by default the number on which the trainings agree best.
    """

    view: str | None = None
    groups: int | None = None

    def summary(self, study: Study) -> str:
        """The answer, groups, closest pairs and agreement, for people."""
        found = self._findings(study)
        if found is None:
            return "No training is done yet."
        rows = [["group", "inside", "to others", "together in", "labels"]]
        for place, group in enumerate(found.groups, start=1):
            figures = [_number(group.inside), _number(group.outside), _share(group.together)]
            rows.append([str(place), *figures, ", ".join(group.tasks)])
        pairs = [["closest by " + found.label, "value", "in the trainings", "common labels"]]
        for pair in found.views.closest_pairs(found.view, 10):
            between = "-" if pair.low is None else f"{pair.low:.3g} to {pair.high:.3g}"
            pairs.append([f"{pair.task}, {pair.other}", f"{pair.value:.3g}", between, f"{pair.common_labels:,}"])
        tables = [rows, pairs, _closest_rows(found), rank_rows(found.comparison)]
        return "\n\n".join([found.sentence, *_notes(found, study), *map(markdown_table, tables)])

    def write(self, results: Path, study: Study, origin: Origin) -> Written:
        """Write ``report.html``, ``views.json``, ``views.csv``, a GraphML file of the view, and pictures."""
        written, found, folder = Written(), self._findings(study), results.parent
        study.results.flush()
        if study.results.not_written is not None:
            written.missing[results.name] = study.results.not_written
        if found is None:
            return written
        views, view = found.views, found.view
        # Several files of results in one folder do not overwrite what belongs to the others.
        begin = "" if results.stem == "results" else f"{results.stem}_"
        writes: dict[str, Callable[[Path], Any]] = {
            "views.json": views.to_json,
            "views.csv": views.to_csv,
            f"{view}.graphml": lambda path: views.to_graphml(path, view),
        }
        draws: dict[str, Callable[[Path], Any]] = {
            "views.png": lambda path: draw_views(views, path),
            "tree.png": lambda path: draw_view_tree(views, path=path, view=view, fill=found.fill),
            "graph.png": lambda path: draw_view_graph(views, view, path),
        }
        for name, write in (writes | (draws if len(views.tasks) <= _MOST_PICTURED else {})).items():
            path = folder / f"{begin}{name}"
            path.unlink(missing_ok=True)  # that of an earlier run
            attempt(written, path.name, functools.partial(write, path), OF_PICTURES)
        drawn = {name: folder / f"{begin}{name}" for name in draws}
        page = folder / f"{begin}report.html"
        attempt(written, page.name, lambda: write_text(page, _page(found, study, origin, drawn)))
        written.page = None if page.name in written.missing else page
        return written

    def _findings(self, study: Study) -> Findings | None:
        (setting,) = study.settings
        (method,) = study.methods_of(setting)
        results = list(study.reported(setting, method).values())
        return findings(results, self.view, self.groups) if results else None


def _page(found: Findings, study: Study, origin: Origin, drawn: dict[str, Path]) -> str:
    jinja2 = need("jinja2")
    # The styles of all reports are beside the folder of this one.
    root = resources.files(__package__.rpartition(".")[0])
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: root.joinpath(*name.split("/")).read_text(encoding="utf-8")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["signs"] = lambda text: text.replace("+-", "\N{PLUS-MINUS SIGN}")
    (setting,) = study.settings
    page: str = environment.get_template("relations/page.html").render(
        title=setting.label,
        origin=origin,
        found=found,
        notes=_notes(found, study),
        alone=[task for group in found.groups if len(group.tasks) == 1 for task in group.tasks],
        tree=_inside(drawn.get("tree.png")),
        graph=_inside(drawn.get("graph.png")),
        views=need("markupsafe").Markup(_without_notes(found.views).to_html(_PAIRS)),
        ranks=rank_rows(found.comparison),
        reading=_READING,
        facts=_facts(found, study),
        number=_number,
        count=_count,
    )
    return page


def _closest_rows(found: Findings) -> list[list[str]]:
    """The closest pairs of each view beside each other."""
    rows = [["view", "closest pairs"]]
    for kind in found.views.kinds:
        pairs = found.views.closest_pairs(kind.key, _PAIRS)
        said = "; ".join(f"{pair.task} and {pair.other} {pair.value:.2g}" for pair in pairs)
        rows.append([kind.label, said or "nothing is known of any pair"])
    return rows


def _without_notes(views: RelationViews) -> RelationViews:
    """The notes are told above, and not twice."""
    return RelationViews(views.tasks, views.matrices, views.common_labels, views.trajectory)


def _notes(found: Findings, study: Study) -> list[str]:
    notes = [note for note in found.views.notes if found.says or not note.startswith("The model is at chance level")]
    again = dict(zip(found.comparison.views, found.comparison.over_seeds.tolist()))
    if again[found.view] < NOISE:
        notes.append(
            f"{_begun(found.label)} says something else in each training (rank correlation {again[found.view]:.2f})."
        )
    elif other := [name for name, value in again.items() if value < NOISE]:
        named = ", ".join(label_of(found.views, name) for name in other)
        notes.append(f"Of no use here, as they say something else in each training: {named}.")
    if found.view not in WITHOUT_COMMON_LABELS and found.unknown:
        notes.append(
            f"{_begun(found.label)} knows nothing of {_count(found.unknown, 'pair')}, which count as "
            "neither close nor far."
        )
    if found.trainings < len(study.seeds):
        notes.append(f"Only {found.trainings} of {len(study.seeds)} trainings are done: run the same command to go on.")
    return notes


def _facts(found: Findings, study: Study) -> dict[str, str]:
    (setting,) = study.settings
    values, about = setting.values, study.results.about
    epochs = ", ".join(map(str, found.kept_after))
    facts = {
        "trainings": f"{found.trainings}, of {values['epochs']} epochs in batches of {values['batch_size']}",
        "views kept after epoch": epochs,
        "mean test score": f"{found.score:.3f} (AUC, accuracy, or one minus the nMSE)",
        "processor time": duration_text(sum(own.get("processor_seconds", 0) for own in about)),
    }
    if dates := sorted({own["date"][:10] for own in about if "date" in own}):
        facts["trained"] = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    names: dict[str, Any] = {name: None for own in about for name in own.get("versions", {})}
    for name in ("saliency-reg", "torch"):
        if name in names:
            facts[name] = ", ".join(sorted({own["versions"][name] for own in about if name in own.get("versions", {})}))
    return facts


def _inside(path: Path | None) -> str:
    if path is None or not path.exists():
        return ""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _begun(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _share(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.0f} %"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
