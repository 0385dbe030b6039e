"""A study as one self-contained page: verdicts, tables, differences, relations, learning curves, and how it was made."""

from __future__ import annotations

import base64
import dataclasses
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from saliency_reg.integrations.plot import draw_task_tree, task_order

from ..runtime.errors import need
from ..runtime.tables import duration_text
from .charts import forests, learning_curves
from .comparison.report.options import Comparison
from .comparison.report.ranks import ranked_methods, ranks_sentence
from .comparison.report.table import comparison_rows, legend, published_rows
from .comparison.report.verdict import comparison_verdicts
from .study import Setting, Study
from .tables import LEGEND, rows_of
from .verdicts import our_method, verdicts

#: File of the plot of critical differences, without ``.png``.
RANKS_PICTURE = "critical_differences"
#: The page draws these itself, or a later version of them, or shows them elsewhere.
_OWN_PICTURES = ("relations_", "learning_curves", RANKS_PICTURE)
#: With more tasks than this only the relations of the method of the verdict are shown, to keep the page small.
_MANY_TASKS = 40
_MOST_IN_TREE = 80
#: Relative weights up to this are no preference.
_NEARLY_UNIFORM = 1.2
#: Told in words.
_PAIRS = 8


@dataclasses.dataclass(frozen=True)
class Origin:
    """How a study came about.

    Attributes:
        name: of the study.
        description: what it compares.
        command: as typed.
        pictures: PNG files to show; one that has the name of the study comes before its tables.
    """

    name: str
    description: str
    command: str
    pictures: Sequence[Path] = ()
    introduction: str = ""


def page(
    study: Study,
    origin: Origin,
    metrics: Sequence[str],
    compared: Sequence[str],
    judged: Sequence[str] = (),
    comparison: Comparison | None = None,
) -> str:
    """Lay out everything that is known so far, with styles, scripts and pictures inside.

    Args:
        study: its results.
        origin: where they come from.
        metrics, compared: columns of the tables.
        judged: the verdict is about the first that a setting has; by default the first that is ``compared``.
        comparison: makes it the page of a comparison of many methods.
    """
    about = judged or compared or metrics[:1]

    def rows(setting: Setting) -> list[list[str]]:
        if comparison is None:
            return rows_of(study, setting, metrics, compared)
        return comparison_rows(study, setting, (metrics, compared, judged))

    relations = _relations(study)
    jinja2 = need("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(
            lambda name: resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
        ),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["signs"] = lambda text: text.replace("+-", "\N{PLUS-MINUS SIGN}")
    found: str = environment.get_template("page.html").render(
        origin=origin,
        title=origin.name.replace("_", " ").capitalize(),
        compares=comparison is not None,
        verdicts=verdicts(study, about) if comparison is None else comparison_verdicts(study, about),
        done=f"{study.done} of {study.trainings} trainings are done.",
        legend=[LEGEND] if comparison is None else [LEGEND, legend(study)],
        tables=[(own.label, rows(own)) for own in study.settings],
        published=[] if comparison is None else [(own, published_rows(own)) for own in comparison.published],
        ranks=[] if comparison is None else _ranks(study, about, origin.pictures),
        forests=forests(study, compared or metrics[:1], by_adjusted=comparison is not None),
        relations=relations,
        beside=_beside(relations),
        first=_pictures(path for path in origin.pictures if path.stem == origin.name),
        pictures=_pictures(path for path in origin.pictures if path.stem != origin.name),
        curves=learning_curves(study),
        facts=_facts(study),
    )
    return found


def _relations(study: Study) -> list[dict[str, Any]]:
    """Mean relations of each method that learns them, relative to uniform ones, in cluster order."""
    numpy = need("numpy")
    found = []
    for setting in study.settings:
        ours = our_method(study, setting)
        for method in sorted(study.methods_of(setting), key=lambda own: own is not ours):
            results = [own for own in study.reported(setting, method).values() if own.get("relations")]
            read = (numpy.array(result["relations"], dtype=float) for result in results)
            known = [own for own in read if numpy.isfinite(own).all()]  # a training that diverged has none
            if not known or method.rule == "fixed" or (len(known[0]) > _MANY_TASKS and method is not ours):
                continue
            mean = numpy.mean(known, axis=0)
            off = ~numpy.eye(len(mean), dtype=bool)
            if len(mean) > 1 and mean[off].sum() > 0:
                names = list(results[0].get("tasks") or results[0]["scores"])
                label = f"{setting.label}: {method.label}, {_seeds(len(known))}"
                weights = numpy.where(off, mean, 0.0) / mean[off].mean()
                of = {"setting": setting.label, "method": method.label}
                found.append({**of, **_picture_of_relations(label, weights, names)})
    # The first is shown first: one whose names can be read.
    return sorted(found, key=lambda own: len(own["tasks"]) > _MANY_TASKS)


def _beside(relations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Settings in which several methods learned relations: which of them, and the one whose order all have."""
    places: dict[str, list[int]] = {}
    for place, own in enumerate(relations):
        places.setdefault(own["setting"], []).append(place)
    return [{"setting": label, "order": own[0], "places": own} for label, own in places.items() if len(own) > 1]


def _ranks(study: Study, metrics: Sequence[str], pictures: Sequence[Path]) -> list[dict[str, str]]:
    """What the ranks show in each setting, with the picture, if it was drawn."""
    found = []
    for setting in study.settings:
        ranked = ranked_methods(study, setting, metrics)
        if ranked is not None:
            name = RANKS_PICTURE if len(study.settings) == 1 else f"{setting.key}_{RANKS_PICTURE}"
            source = next((_inside(path, "image/png") for path in pictures if path.stem == name), "")
            found.append({"label": setting.label, "sentence": ranks_sentence(study, ranked), "source": source})
    return found


def _picture_of_relations(label: str, weights: Any, names: list[str]) -> dict[str, Any]:
    names = names if len(names) == len(weights) else [str(index) for index in range(len(weights))]
    order = task_order(weights)
    tree = ""
    if len(names) <= _MOST_IN_TREE:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "tree.svg")
            draw_task_tree(weights, names, path)
            tree = _inside(path, "image/svg+xml")
    pairs = sorted(
        ((weights[a][b], names[a], names[b]) for a in order for b in order if a < b), key=lambda own: -own[0]
    )
    return {
        "label": label,
        "tasks": [names[index] for index in order],
        "weights": [[float(f"{weights[a][b]:.3g}") if a != b else 0 for b in order] for a in order],
        "pairs": [f"{a} \N{EN DASH} {b}: {weight:.2f}" for weight, a, b in pairs[:_PAIRS]],
        "tree": tree,
        "most": f"{weights.max():.2f}",
        "uniform": weights.max() < _NEARLY_UNIFORM,
    }


def _inside(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _pictures(paths: Iterable[Path]) -> list[dict[str, str]]:
    shown = [path for path in paths if not any(name in path.stem for name in _OWN_PICTURES)]
    return [{"title": path.stem.replace("_", " "), "source": _inside(path, "image/png")} for path in shown]


def _facts(study: Study) -> dict[str, str]:
    """Seeds, and what is known of the machines and versions behind the results."""
    about = study.results.about
    found = {"seeds": _range(study.seeds), "tuning seeds": _range(study.tuning_seeds)}
    if dates := sorted(own["date"][:10] for own in about if "date" in own):
        found["trained"] = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    seconds = sum(own.get("processor_seconds", own.get("seconds", 0)) for own in about)
    found["processor time"] = duration_text(seconds)
    machines = {", ".join(f"{key} {value}" for key, value in own.get("machine", {}).items()) for own in about}
    found["machine"] = "; ".join(sorted(machines - {""})) or "-"
    names: Mapping[str, None] = {name: None for own in about for name in own.get("versions", {})}
    for name in names:
        found[name] = ", ".join(sorted({own["versions"][name] for own in about if name in own.get("versions", {})}))
    return found


def _seeds(count: int) -> str:
    return f"mean of {count} seeds" if count > 1 else "one seed"


def _range(seeds: Sequence[int]) -> str:
    return f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else ", ".join(map(str, seeds))
