"""Views as a part of a page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from torch import Tensor

from .kinds import VIEWS
from .shades import Scale, scale_of

if TYPE_CHECKING:
    from .relation_views import RelationViews

_CLOSE, _OPPOSED, _NEUTRAL, _UNKNOWN = (179, 88, 6), (84, 39, 136), (247, 247, 247), "#bdbdbd"
#: With more tasks there are no numbers in the cells, and then no maps.
_MOST_NUMBERED, _MOST_TASKS = 12, 40
_RULES = {
    "": "font:13px sans-serif",
    ".maps": "display:flex;flex-wrap:wrap;gap:16px;align-items:flex-start",
    "table": "border-collapse:collapse;margin:6px 0;font:inherit",
    "caption": "text-align:left;font-weight:bold",
    "th": "font-weight:normal;text-align:right;padding:1px 4px;overflow-wrap:anywhere;max-width:16em",
    "th.n": "color:#888;font-size:10px;padding:1px;text-align:center",
    ".map td": "color:#000;min-width:14px;height:14px;padding:1px;text-align:center;font-size:11px;border:1px solid #fff",
    ".map td.w": "color:#fff",
    ".pairs td": "text-align:left;padding:1px 8px;max-width:32em;overflow-wrap:anywhere",
}
_STYLE = "".join(f".relation-views {what}{{{how}}}" for what, how in _RULES.items())


def page_of(views: RelationViews, pairs: int) -> str:
    """Return notes, heat maps, closest pairs and rank correlations as HTML, with its style inside."""
    ordered = views.subset(views.order())
    parts = [
        f"<style>{_STYLE}</style><p>{len(views.tasks)} tasks; orange is close, purple the opposite, grey is unknown.</p>"
    ]
    if views.notes:
        parts.append(f"<ul>{''.join(f'<li>{_text(note)}</li>' for note in views.notes)}</ul>")
    maps = []
    if len(views.tasks) > _MOST_TASKS:
        parts.append(
            f"<p>Heat maps of more than {_MOST_TASKS} tasks are not shown here: draw them with draw_views, or look at "
            "views.subset([...]).</p>"
        )
    else:
        for key in ordered:
            scale = scale_of(VIEWS[key], ordered[key])
            maps.append(_heat_map(VIEWS[key].label, ordered.tasks, ordered[key], scale, diagonal=False))
    if len(list(views)) > 1:
        labels = [VIEWS[key].label for key in views]
        scale = Scale(-1.0, 1.0, 0.0, turned=False)
        caption = "Rank correlations between views"
        maps.append(_heat_map(caption, labels, views.rank_correlations(), scale, diagonal=True))
    parts.append(f'<div class="maps">{"".join(maps)}</div>')
    parts.append(f'<div class="maps">{"".join(_closest(views, key, pairs) for key in views)}</div>')
    return f'<div class="relation-views">{"".join(parts)}</div>'


def _heat_map(caption: str, names: Sequence[str], matrix: Tensor, scale: Scale, *, diagonal: bool) -> str:
    numbered = len(names) <= _MOST_NUMBERED
    heads = "".join(f'<th class="n">{place}</th>' for place in range(1, len(names) + 1))
    rows = []
    for i, name in enumerate(names):
        cells = []
        for j, value in enumerate(matrix[i].tolist()):
            if i == j and not diagonal:
                cells.append("<td></td>")
            elif value != value:
                cells.append(f'<td bgcolor="{_UNKNOWN}"></td>')
            else:
                cells.append(_cell(scale.shade(value), scale.text(value) if numbered else ""))
        rows.append(f'<tr><th>{_text(name)}</th><th class="n">{i + 1}</th>{"".join(cells)}</tr>')
    return f'<table class="map"><caption>{_text(caption)}</caption><tr><th></th><th></th>{heads}</tr>{"".join(rows)}</table>'


def _cell(shade: float, text: str) -> str:
    end = _CLOSE if shade > 0 else _OPPOSED
    red, green, blue = (round(light + abs(shade) * (dark - light)) for light, dark in zip(_NEUTRAL, end))
    white = ' class="w"' if text and 0.3 * red + 0.59 * green + 0.11 * blue < 128 else ""
    return f'<td bgcolor="#{red:02x}{green:02x}{blue:02x}"{white}>{text}</td>'


def _closest(views: RelationViews, key: str, count: int) -> str:
    rows = []
    pairs = views.closest_pairs(key, count)
    over = any(pair.low is not None for pair in pairs)
    for pair in pairs:
        between = f"<td>{pair.low:.3g} to {pair.high:.3g}</td>" if pair.low is not None else "<td></td>" if over else ""
        rows.append(
            f"<tr><td>{_text(pair.task)}</td><td>{_text(pair.other)}</td><td>{pair.value:.3g}</td>{between}"
            f"<td>{pair.common_labels:,}</td></tr>"
        )
    names = ("task", "other", "value", *(["95 % of the trajectory"] if over else []), "common labels")
    heads = "".join(f"<td><i>{name}</i></td>" for name in names)
    body = f"<tr>{heads}</tr>{''.join(rows)}" if rows else "<tr><td>nothing is known of any pair</td></tr>"
    return f'<table class="pairs"><caption>Closest: {_text(VIEWS[key].label)}</caption>{body}</table>'


def _text(name: str) -> str:
    # Half a surrogate pair cannot be sent in UTF-8.
    return escape(name.encode("utf-8", "replace").decode("utf-8"))
