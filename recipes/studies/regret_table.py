"""The regret of the defaults as a table for people, and whether the rule for defaults holds."""

from __future__ import annotations

import math

from .regret import LEAST_KEPT, MOST_WORSE, Compared, Regret, Row
from .tables import in_percent, markdown_table, statistic_text, title_of
from .verdicts import LEAST_SEEDS

_TITLES = ("set", "metric", "seeds", "baseline, tuned", "SRDML, tuned", "difference", "SRDML, not tuned", "difference")
_LAST_TITLES = ("not tuned against tuned", "not tuned against the baseline", "rule")


def regret_table(regret: Regret) -> str:
    """Lay out the table, what stands beside it, whether the rule holds, and what is left out."""
    rows, parts = regret.rows, ["No setting has all it takes."]
    if rows:
        parts = [markdown_table([(*_TITLES, *_LAST_TITLES), *map(_cells, rows)]), _verdict(rows)]
        beside = [[row.label, own.label, *_texts(row, own)] for row in rows for own in row.beside]
        titles = ("beside it: set", "method", "metric", "difference to the baseline")
        parts += [markdown_table([titles, *beside])] if beside else []
    parts += [f"Left out, {why}: {'; '.join(labels)}." for why, labels in regret.left_out.items()]
    return "\n\n".join(parts)


def _verdict(rows: list[Row]) -> str:
    judged = [row for row in rows if row.holds() is not None]
    kept, of_error = (sum(bool(row.holds(flag)) for row in judged) for flag in (False, True))
    gaining = [row.label for row in judged if row.gains]
    broken = [f"{row.label} ({_shortfall(row)})" for row in judged if not (row.holds() and row.holds(of_error=True))]
    text = (
        f"The interval of a tuned gain is clear of 0 on {len(gaining)} of {len(judged)} sets: "
        f"{'; '.join(gaining) or 'none'}.\n"
        f"The rule (there at least {LEAST_KEPT:.0f} % of the gain are kept without tuning; elsewhere at most "
        f"{MOST_WORSE:.0f} % worse than the baseline) holds on {kept} of {len(judged)} sets, and on {of_error} where an AUC "
        f"counts by what it lacks of 1. Broken by: {'; '.join(broken) or 'none'}."
    )
    few = [row.label for row in rows if row not in judged]
    return text + (f"\nNot judged, with less than {LEAST_SEEDS} seeds: {'; '.join(few)}." if few else "")


def _cells(row: Row) -> list[str]:
    held = row.holds()
    rule = "too few seeds" if held is None else "holds" if held else "broken"
    if held and not row.holds(of_error=True):
        rule = f"broken in 1 - {title_of(row.metric)} alone"
    tuned, its_difference = _texts(row, row.tuned)
    return [
        row.label,
        title_of(row.metric) + (" %" if in_percent(row.metric) else ""),
        f"{row.seeds}" if row.seeds == row.planned else f"{row.seeds} of {row.planned}",
        f"{row.baseline.label}: {_texts(row, row.baseline)[0]}",
        f"{row.tuned.label} (of {row.tried}): {tuned}",
        its_difference,
        *_texts(row, row.untuned),
        _against_tuned(row),
        _against_baseline(row),
        rule,
    ]


def _texts(row: Row, own: Compared) -> list[str]:
    return [statistic_text(row.metric, own.summary), statistic_text(row.metric, own.difference, sign="+")]


def _shortfall(row: Row) -> str:
    return _against_tuned(row) if row.gains else _against_baseline(row)


def _against_tuned(row: Row) -> str:
    if not row.gains:
        return "no clear tuned gain"
    return "none of the gain kept" if row.kept <= 0 else f"{row.kept:.1f} % of the gain kept"


def _against_baseline(row: Row) -> str:
    if math.isnan(row.better()):
        return "diverged"
    text = f"{abs(row.better()):.2f} % {'better' if row.better() > 0 else 'worse'}"
    if in_percent(row.metric):
        text += f" ({abs(row.better(of_error=True)):.2f} % of 1 - {title_of(row.metric)})"
    return text
