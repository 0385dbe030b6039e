"""Whether methods rank differently, and which can be told apart (Demsar, JMLR 2006): Friedman's test, and Nemenyi's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ....methods.methods import Method
from ....runtime.errors import need
from ...study import Setting, Study
from ...tables import lower_is_better, title_of
from .intervals import challengers

#: With fewer methods there is nothing to rank, with fewer blocks nothing to test.
_LEAST_METHODS, _LEAST_BLOCKS = 3, 2
_MISSES = 0.05


@dataclass(frozen=True)
class Ranking:
    """Mean ranks, 1 is best.

    Attributes:
        means: of the methods, as given.
        blocks: in how many blocks they were ranked.
        p: of Friedman's test that all methods are equal, in the form of Iman and Davenport.
        critical: mean ranks that differ by less cannot be told apart, with 95 % for all pairs at once.
    """

    means: tuple[float, ...]
    blocks: int
    p: float
    critical: float


def critical_difference(methods: int, blocks: int) -> float:
    """Nemenyi's ``q sqrt(k (k + 1) / (6 N))``, of ``k`` methods in ``N`` blocks (Demsar 2006, section 3.2.2)."""
    quantile = need("scipy.stats").studentized_range.ppf(1 - _MISSES, methods, math.inf) / math.sqrt(2)
    return float(quantile) * math.sqrt(methods * (methods + 1) / (6 * blocks))


def ranking(values: Any, lower: bool) -> Ranking:
    """Rank methods within each block, and test.

    Args:
        values: ``[blocks, methods]``, at least 2 and 3; NaN, of a training that diverged, is worse than any.
        lower: whether lower values are better.
    """
    stats = need("scipy.stats")
    values = np.asarray(values, dtype=float)
    scores = np.where(np.isnan(values), np.inf, values if lower else -values)
    ranks = stats.rankdata(scores, axis=1)  # [N, k], equal ones share the mean of their ranks
    blocks, methods = ranks.shape
    statistic = 0.0 if (ranks == ranks[:, :1]).all() else float(stats.friedmanchisquare(*ranks.T).statistic)
    # The chi-square approximation is poor for few blocks (Demsar 2006, eq. 3).
    rest = blocks * (methods - 1) - statistic
    ratio = (blocks - 1) * statistic / rest if rest > 1e-9 else math.inf
    p = float(stats.f.sf(ratio, methods - 1, (methods - 1) * (blocks - 1)))
    return Ranking(tuple(ranks.mean(0).tolist()), blocks, p, critical_difference(methods, blocks))


@dataclass(frozen=True)
class RankedMethods:
    """The methods of a setting by their mean rank, the best first."""

    setting: Setting
    metric: str
    methods: tuple[Method, ...]
    ranking: Ranking

    @property
    def groups(self) -> list[tuple[int, int]]:
        """First and last place of each largest group whose methods cannot be told apart; those of one are left out."""
        means, found = self.ranking.means, list[tuple[int, int]]()
        for first in range(len(means)):
            last = max(place for place in range(len(means)) if means[place] - means[first] < self.ranking.critical)
            if last > first and (not found or last > found[-1][1]):
                found.append((first, last))
        return found


def ranked_methods(study: Study, setting: Setting, metrics: Sequence[str]) -> RankedMethods | None:
    """Rank by the first of the metrics that the setting has, within each seed.

    A block is a seed, with the mean over its tasks: the tasks of one training share a network and its luck, and
    would count the same evidence many times. Only methods that are done in all seeds of the baseline are ranked,
    and the trivial model is left out.

    Returns:
        ``None`` where fewer than three methods, or two seeds, can be ranked.
    """
    baseline = study.methods[study.baseline]
    if study.baseline not in setting.methods:
        return None
    seeds = study.reported(setting, baseline)
    metric = next((name for name in metrics if any(name in own["macro"] for own in seeds.values())), None)
    if metric is None:
        return None
    found = {method.key: study.reported(setting, method) for method in (baseline, *challengers(study, setting))}
    done = {key: own for key, own in found.items() if set(own) >= set(seeds)}
    if len(done) < _LEAST_METHODS or len(seeds) < _LEAST_BLOCKS:
        return None
    values = np.array([[own[seed]["macro"].get(metric) for own in done.values()] for seed in seeds], dtype=float)
    known = ranking(values, lower_is_better(metric))
    order = sorted(range(len(done)), key=lambda place: known.means[place])
    keys = list(done)
    ordered = Ranking(tuple(known.means[place] for place in order), known.blocks, known.p, known.critical)
    return RankedMethods(setting, metric, tuple(study.methods[keys[place]] for place in order), ordered)


def ranks_sentence(study: Study, ranked: RankedMethods) -> str:
    """What the ranks show, and what they cannot."""
    known, methods = ranked.ranking, ranked.methods
    mean = dict(zip((own.key for own in methods), known.means))
    base = mean[study.baseline]
    best = methods[0]
    others = "" if best.key == study.baseline else f", {study.methods[study.baseline].label} {base:.1f}"
    text = (
        f"Mean ranks in {title_of(ranked.metric)} over {known.blocks} seeds, 1 is best of {len(methods)}: "
        f"{best.label} has {known.means[0]:.1f}{others}. "
    )
    p = "p < 0.001" if known.p < 0.001 else f"p = {known.p:.3f}"
    if known.p >= _MISSES:
        return f"{text}No method ranks clearly differently from the others (Friedman's test, {p})."
    text += f"The methods do not all rank alike (Friedman's test, {p}). "
    if known.critical >= len(methods) - 1:
        return (
            f"{text}Which ones differ cannot be told from {known.blocks} seeds: mean ranks would have to be "
            f"{known.critical:.1f} apart (Nemenyi's test, 95 %), more than there are places."
        )
    better, worse = (
        [own.label for own in methods if sign * (base - mean[own.key]) >= known.critical] for sign in (1, -1)
    )
    text += f"Mean ranks can be told apart from {known.critical:.1f} on (Nemenyi's test, 95 %)."
    for word, names in (("better", better), ("worse", worse)):
        text += f" Clearly {word} than the baseline: {'; '.join(names)}." if names else ""
    return text if better or worse else f"{text} None is told apart from the baseline."
