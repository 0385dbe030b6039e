"""What a study leaves beside its results: tables, numbers, pictures, and a page that shows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from saliency_reg.errors import SaliencyRegError

from ..runtime.files import write_json, write_text
from .comparison.report.options import Comparison
from .comparison.report.rank_picture import draw_ranks
from .comparison.report.ranks import ranked_methods, ranks_sentence
from .comparison.report.table import Columns, comparison_markdown, csv_figures, legend, published_markdown
from .comparison.report.verdict import comparison_verdicts
from .page import RANKS_PICTURE, Origin, page
from .study import Study
from .tables import LEGEND, as_csv, markdown, tuning
from .verdicts import verdicts

#: Tables for people and for programs, all numbers, and the page.
WRITTEN_BESIDE = (".md", ".csv", ".json", ".html")

_Kinds = tuple[type[Exception], ...]
_EXPECTED: _Kinds = (OSError, SaliencyRegError)
#: Matplotlib has many: it takes $ in a name for mathematics.
OF_PICTURES: _Kinds = (Exception,)


@dataclass
class Written:
    """What came of it.

    Attributes:
        page: that was written, if it was.
        further: tables to print.
        missing: what could not be written, and why.
    """

    page: Path | None = None
    further: str = ""
    missing: dict[str, str] = field(default_factory=dict)


class OwnReport(Protocol):
    """The report of a study that compares nothing."""

    def summary(self, study: Study) -> str:
        """What is known, for people."""

    def write(self, results: Path, study: Study, origin: Origin) -> Written:
        """Write all that can be written beside the results."""


def summary(study: Study, columns: Columns, comparison: Comparison | None = None) -> str:
    """Tables and verdicts, for people; of a comparison also ranks, and published figures."""
    metrics, compared, judged = columns
    about = judged or compared or metrics[:1]
    if comparison is not None:
        said = comparison_verdicts(study, about)
        ranked = [ranked_methods(study, setting, about) for setting in study.settings]
        parts = [comparison_markdown(study, columns), LEGEND, legend(study), *map(str, said)]
        parts += [f"{own.setting.label}: {ranks_sentence(study, own)}" for own in ranked if own is not None]
        return "\n\n".join(filter(None, [*parts, published_markdown(comparison.published)]))
    said = verdicts(study, about)
    return "\n\n".join([markdown(study, metrics, compared), LEGEND, *map(str, said)])


def write_beside(
    results: Path,
    study: Study,
    origin: Origin,
    content: Mapping[str, Any],
    columns: Columns,
    draw: Callable[[Study, Path | None], str] | None,
    comparison: Comparison | None = None,
) -> Written:
    """Write all that can be written.

    Args:
        results: file of the results.
        study: the same.
        origin: where they come from; the pictures of ``draw`` are added.
        content: of the JSON file.
        columns: metrics, those that are compared, and those that the verdict is about.
        draw: pictures of a study into a folder.
        comparison: makes it the report of a comparison.
    """
    written, (metrics, compared, judged) = Written(), columns
    study.results.flush()
    if study.results.not_written is not None:
        written.missing[results.name] = study.results.not_written
    for_people, for_programs, numbers, report = map(results.with_suffix, WRITTEN_BESIDE)
    if report.stem == "results":
        report = report.with_stem("report")
    text = f"{summary(study, columns, comparison)}\n\n{tuning(study)}\n"
    attempt(written, for_people.name, lambda: write_text(for_people, text))
    attempt(
        written,
        for_programs.name,
        lambda: write_text(for_programs, as_csv(study, metrics, csv_figures(study, columns))),
    )
    attempt(written, numbers.name, lambda: write_json(numbers, content))
    before = _pictures(results.parent)
    if draw is not None:
        written.further = attempt(written, "pictures", lambda: draw(study, results.parent), OF_PICTURES) or ""
    if comparison is not None:
        about = judged or compared or metrics[:1]
        attempt(written, "critical differences", lambda: _draw_ranks(study, results.parent, about), OF_PICTURES)
    drawn = [path for path, changed in _pictures(results.parent).items() if before.get(path) != changed]
    whole = replace(origin, pictures=drawn)
    attempt(written, report.name, lambda: write_text(report, page(study, whole, metrics, compared, judged, comparison)))
    written.page = None if report.name in written.missing else report
    return written


def _draw_ranks(study: Study, folder: Path, metrics: Sequence[str]) -> None:
    for setting in study.settings:
        ranked = ranked_methods(study, setting, metrics)
        if ranked is not None:
            prefix = "" if len(study.settings) == 1 else f"{setting.key}_"
            draw_ranks(ranked, study.baseline, folder / f"{prefix}{RANKS_PICTURE}.png")


def _pictures(folder: Path) -> dict[Path, int]:
    """With the time of their last change, in nanoseconds."""
    return {path: path.stat().st_mtime_ns for path in sorted(folder.glob("*.png"))}


def attempt(written: Written, name: str, write: Callable[[], Any], caught: _Kinds = _EXPECTED) -> Any:
    """Write something, or note why it could not be written."""
    try:
        return write()
    except caught as error:
        known = isinstance(error, _EXPECTED)
        reason = getattr(error, "strerror", None) or (str(error) if known else f"{type(error).__name__}: {error}")
        written.missing[name] = " ".join(reason.split())
        return None
