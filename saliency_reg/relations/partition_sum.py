"""The sum that normalises the entropic weights of very many pairs, at the price of those that moved."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..torch_tools import version_of

#: Pairs whose share of the sums is kept as one number each.
_BLOCK = 128
#: Blocks that are gone through at a time.
_AT_ONCE = 256
#: Terms of the series in ``1 - centre / scale``, which is at most 1/16 of the temperature: the rest is below 1e-13.
_TERMS = 11
#: With larger exponents than this, their range is too wide for one centre.
_WIDEST = 200.0


class PartitionSum:
    """Weights ``exp(-D_p / unit) / sum_q exp(-D_q / unit)`` of some of P pairs; one never seen has the mean of ``D``.

    Kept for each block of pairs are the number seen, the sum of ``D``, and ``sum exp(-t) t^k`` for
    ``t = (D - centre) / unit`` about a centre near the mean. Where ``unit`` is the mean times a factor it changes in each
    step; the sum at the new one follows from its Taylor series, and all blocks are gone through only when the mean has
    left the surroundings of the centre. All of it is a function of the state alone, to the bit, whatever the way to it: so
    a resumed run goes on as the uninterrupted one.
    """

    def __init__(self, distances: Tensor, weights: Tensor) -> None:
        self._distances, self._weights = distances, weights
        blocks = -(-len(weights) // _BLOCK)
        self._seen, self._sums = torch.zeros(2, blocks, dtype=torch.float64, device="cpu")
        self._moments = torch.zeros(_TERMS, blocks, dtype=torch.float64, device="cpu")
        self._around: tuple[float, float] | None = None  # centre and unit of the moments
        self._stale: list[Tensor] = []
        self._refresh_sums(torch.arange(blocks, device="cpu"))
        self._is_now()

    def is_of(self, distances: Tensor, weights: Tensor) -> bool:
        """Whether these buffers were last written when :meth:`moved` or the beginning told of it."""
        buffers = self._distances is distances and self._weights is weights
        return buffers and self._versions == (version_of(distances), version_of(weights)) and -1 not in self._versions

    def moved(self, index: Tensor) -> None:
        """Note that the buffers were written at these pairs."""
        blocks = torch.unique(index // _BLOCK)
        self._refresh_sums(blocks)
        self._stale.append(blocks)
        self._is_now()

    def weights_at(self, index: Tensor, temperature: float, scale: float | None) -> Tensor | None:
        """Return the weights, which add up to 1 over all P; ``None`` where that needs another way.

        ``unit`` is the temperature times the scale, or for ``None`` times the mean.
        """
        pairs, seen = len(self._weights), int(self._seen.sum())
        mean = float(self._sums.sum()) / max(seen, 1)
        if seen == 0:
            return torch.full(index.shape, 1 / pairs, dtype=torch.float64, device="cpu")
        if not 0 < mean < math.inf:
            return None
        width = min(temperature, 1.0) / 8
        centre = math.exp(round(math.log(mean) / width) * width)
        unit = temperature * (centre if scale is None else scale)
        if centre / unit > _WIDEST:
            return None
        self._refresh_moments(centre, unit)
        ratio = centre / mean if scale is None else 1.0
        factors = [(1 - ratio) ** k / math.factorial(k) for k in range(_TERMS)]
        moments = self._moments.sum(1).tolist()
        of_unseen = math.exp(-ratio * (mean - centre) / unit)
        total = math.fsum([*(a * b for a, b in zip(factors, moments)), (pairs - seen) * of_unseen])
        weights = self._weights[index].double()
        means = torch.where(weights > 0, self._distances[index] / torch.where(weights > 0, weights, 1.0), mean)
        return torch.exp((means - centre) * (-ratio / unit)) / total

    def _is_now(self) -> None:
        self._versions = version_of(self._distances), version_of(self._weights)

    def _means(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``[blocks, _BLOCK]`` distances, and which of them were seen."""
        at = blocks.unsqueeze(1) * _BLOCK + torch.arange(_BLOCK, device="cpu")
        inside = at.clamp(max=len(self._weights) - 1)
        weights = self._weights[inside].double()
        seen = (weights > 0) & (at == inside)
        return torch.where(seen, self._distances[inside] / weights, 0.0), seen

    def _refresh_sums(self, blocks: Tensor) -> None:
        for some in blocks.split(_AT_ONCE):  # type: ignore[no-untyped-call]
            means, seen = self._means(some)
            self._seen[some], self._sums[some] = seen.sum(1).double(), means.sum(1)

    def _refresh_moments(self, centre: float, unit: float) -> None:
        if self._around != (centre, unit):
            self._stale = [self._seen.nonzero().squeeze(1)]
            self._around = centre, unit
        if not self._stale:
            return
        for some in torch.unique(torch.cat(self._stale)).split(_AT_ONCE):  # type: ignore[no-untyped-call]
            means, seen = self._means(some)
            exponents = (means - centre) / unit
            power = torch.where(seen, torch.exp(-exponents), 0.0)
            for moments in self._moments:
                moments[some] = power.sum(1)
                power *= exponents
        self._stale = []
