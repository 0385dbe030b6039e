"""Intervals of the differences of many methods to one baseline that hold for all of them at once.

With 30 methods that are no better than the baseline, more than one in 20 plain intervals is clear of 0, and the best
method of a table looks good by chance. We widen the paired t interval by Bonferroni's correction: with ``m`` methods
and ``n`` seeds ::

    mean +- t(1 - 0.05 / (2 m), n - 1) * std / sqrt(n)

It needs neither equal variances of the methods nor independent ones, and for 5 seeds it is honest where others are not:
the bootstrap draws from 5 values; a test by flipping signs has no p below 2 / 2^5 = 0.06 and never finds anything;
Dunnett's test (1955), pooled over the methods, needs one variance for all, and that of MGDA or single-task can be ten
times as large as others. Holm's steps find a little more, but leave no interval for the size of a difference. Metrics
are not counted: the verdict is about one, chosen beforehand.
"""

from __future__ import annotations

import math

from ....methods.methods import Method
from ....runtime.errors import need
from ...study import Setting, Study
from .options import TRIVIAL

#: The probability that any of the intervals of a table misses its difference.
_MISSES = 0.05


def challengers(study: Study, setting: Setting) -> list[Method]:
    """The methods that are compared with the baseline: all others, but for the trivial model."""
    return [method for method in study.methods_of(setting) if method.key not in (study.baseline, TRIVIAL)]


def reach(count: int, comparisons: int) -> float:
    """Half the width of an interval, in standard deviations of the differences; NaN for fewer than two differences.

    Args:
        count: of the differences, one for each seed.
        comparisons: how many intervals hold at once.
    """
    if count < 2:
        return math.nan
    quantile = need("scipy.stats").t.ppf(1 - _MISSES / (2 * comparisons), count - 1)
    return float(quantile) / math.sqrt(count)


def adjusted_interval(study: Study, setting: Setting, method: Method, metric: str) -> tuple[float, float]:
    """Of the difference to the baseline in a metric, for all :func:`challengers` at once; NaN where it is not known.

    The number of methods is that of those planned: an interval does not widen when another method is done.
    """
    found = study.difference(setting, method, [metric]).get(metric)
    if found is None:
        return math.nan, math.nan
    ours, theirs = (study.reported(setting, own) for own in (method, study.methods[study.baseline]))
    comparisons = max(len(challengers(study, setting)), 1)
    wide = found.std * reach(len(set(ours) & set(theirs)), comparisons)
    return found.mean - wide, found.mean + wide
