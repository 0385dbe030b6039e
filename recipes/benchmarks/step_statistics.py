"""Medians of steps and of their ratios, for the overhead recipe."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["interval", "median", "ratio"]


def median(values: Sequence[float]) -> float:
    """Of some numbers."""
    import numpy

    return float(numpy.median(values))


def ratio(seconds: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Median of the step-by-step ratios, with a 95 % bootstrap interval."""
    import numpy

    ratios = numpy.asarray(seconds) / numpy.asarray(base)
    drawn = numpy.random.default_rng(0).choice(ratios, (9999, len(ratios)))
    low, high = numpy.quantile(numpy.median(drawn, axis=1), [0.025, 0.975])
    return {"median": float(numpy.median(ratios)), "low": float(low), "high": float(high)}


def interval(ratio: dict[str, float]) -> str:
    """As text."""
    return f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
