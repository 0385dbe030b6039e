"""The plot of critical differences: methods on an axis of mean ranks, bars across those that cannot be told apart."""

from __future__ import annotations

from pathlib import Path

from ....runtime.figures import new_figure, save
from .ranks import RankedMethods

_BASELINE, _OTHER, _BAR = "#D55E00", "#1b1e23", "#0072B2"
#: In the units of the vertical axis: a line of text, and the distance of two bars.
_LINE, _BETWEEN = 1.0, 0.45


def draw_ranks(ranked: RankedMethods, baseline: str, path: Path) -> None:
    """Draw as Demsar (2006) does: the best method on the left, labels on both sides.

    Args:
        ranked: of one setting.
        baseline: key of the method that stands out.
        path: of the PNG file.
    """
    means, methods, groups = ranked.ranking.means, ranked.methods, ranked.groups
    count = len(methods)
    half = (count + 1) // 2
    first = 0.7 + _BETWEEN * len(groups) + 0.3  # where the labels begin, below the bars
    bottom, width = first + _LINE * half, 4.0
    figure, axes = new_figure(7.2, 0.9 + 0.2 * bottom)
    low, high = 1, count
    axes.set_xlim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes.set_ylim(bottom, -1.6)
    axes.axis("off")
    axes.plot([low, high], [0, 0], color=_OTHER, linewidth=1.0)
    every = max(1, round(count / 10))
    for tick in sorted({1, count, *range(every, count - every // 2, every)}):
        axes.plot([tick, tick], [-0.2, 0], color=_OTHER, linewidth=1.0)
        axes.text(tick, -0.3, f"{tick}", ha="center", va="bottom", fontsize=8)
    for place, (method, mean) in enumerate(zip(methods, means)):
        left = place < half
        height = first + _LINE * (place if left else count - 1 - place)
        end = low - 0.02 * (high - low) if left else high + 0.02 * (high - low)
        own = _BASELINE if method.key == baseline else _OTHER
        weight = "bold" if method.key == baseline else "normal"
        axes.plot([mean, mean, end], [0, height, height], color=own, linewidth=1.4 if weight == "bold" else 0.7)
        text = f"{method.label}  {mean:.1f}" if left else f"{mean:.1f}  {method.label}"
        axes.text(end, height, f"{text} " if left else f" {text}", color=own, fontsize=8, fontweight=weight,
                  ha="right" if left else "left", va="center", parse_math=False)  # fmt: skip
    for number, (start, stop) in enumerate(groups):
        height = 0.7 + _BETWEEN * number
        axes.plot([means[start], means[stop]], [height, height], color=_BAR, linewidth=width, solid_capstyle="round")
    reach = min(ranked.ranking.critical, count - 1)
    axes.plot([low, low + reach], [-1.3, -1.3], color=_BAR, linewidth=1.4, marker="|", markersize=7)
    more = "" if reach == ranked.ranking.critical else ", more than there are places"
    axes.text(low, -1.42, f"critical difference {ranked.ranking.critical:.1f}{more}", fontsize=8, va="bottom")
    save(figure, path)
