"""Whether heads mix samples, so that the saliency of a sample is not its own: measured in each call until it is known."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from ..capture import CapturedForward
from ..errors import CrossSampleError
from ..saliency import HeadsNow, Saliencies, fixed_statistics, heads_as_they_are, weighed_unequally
from ..torch_tools import gradients_of, warn_user

#: Give up after so many measurements that told nothing, because no output reacts to the feature map (zero weights).
_MOST_UNDECIDED = 20
_MIXES = (
    "an output of one sample depends on the feature map of another one, so the saliency of a sample is not its own, and the "
    "penalty compares noise. {} or pass cross_sample='ignore' if it is meant."
)
_ADVICE = {
    True: "Attention over the batch or a normalisation of your own does that (a BatchNorm in train mode does not, with "
    "cross_sample='fix'): choose a feature map behind it,",
    False: "That is what a BatchNorm in train mode does between the feature map and the outputs: pass cross_sample='fix', "
    "choose a feature map behind it, use LayerNorm or GroupNorm, put it in eval mode,",
}


class SampleMixing:
    """Remembers of the heads, in each mode (train or eval) that they and their parts were in, whether they mix samples."""

    def __init__(self, cross_sample: str) -> None:
        self._cross_sample = cross_sample
        self._warned = cross_sample == "ignore"
        self._unmixed: HeadsNow = frozenset()
        self._mixed: HeadsNow = frozenset()
        self._undecided = 0

    def heads_changed(self) -> None:
        """Forget what is known by the numbers of heads."""
        self._unmixed = self._mixed = frozenset()
        self._undecided = 0

    def are_samples_apart(self, forward: CapturedForward, saliencies: Saliencies, *, needed: bool) -> bool:
        """Warn or refuse if samples are mixed; return whether they have been seen to be apart, if that is ``needed``.

        Otherwise it returns false, and measures nothing any more once the user was told.
        """
        if saliencies.closed_form or not (saliencies.comparable or saliencies.left_out):
            return False
        if self._warned and not needed:
            return False
        now = heads_as_they_are(forward) if saliencies.heads_now is None else saliencies.heads_now
        if not (now <= self._unmixed or now & self._mixed or self._undecided >= _MOST_UNDECIDED):
            self._measure(forward, now)
        if forward.batch_size == 1:
            # Apart from all others, unless that is known to be otherwise for more of them: so that a resumed run which
            # begins with a single sample goes the way of the uninterrupted run.
            return not now & self._mixed
        return now <= self._unmixed

    def tell_left_out(self, forward: CapturedForward, saliencies: Saliencies) -> None:
        """Tell why tasks have no saliency, where it is not that samples are mixed, of which the user was told."""
        if saliencies.left_out and not heads_as_they_are(forward) & self._mixed:
            for message in saliencies.left_out:
                warn_user(message)

    def _measure(self, forward: CapturedForward, now: HeadsNow) -> None:
        fix = self._cross_sample == "fix"
        mixes, words = mixes_samples(forward, fix=fix), _MIXES.format(_ADVICE[fix])
        if mixes is None:
            self._undecided += 1
        elif not mixes:
            self._unmixed |= now
        elif self._cross_sample == "error":
            raise CrossSampleError(words[0].upper() + words[1:])
        else:
            self._mixed |= now
            if not self._warned:
                self._warned = True
                warn_user(words)


def mixes_samples(forward: CapturedForward, *, fix: bool) -> bool | None:
    """Whether the outputs of sample 0 depend on a feature map at other samples; with ``fix``, past any BatchNorm.

    ``None`` where that cannot be told: for a single sample, and where a head is blind to its own sample (zero weights).
    """
    decided = True
    for feature in forward.features:
        size = feature.tensor.shape[feature.batch_axis]
        outputs = [output for output in forward.outputs if output.ndim > 0 and len(output) == size]
        if size < 2 or not outputs:
            return None
        first = [weighed_unequally(output[:1]).sum() for output in outputs]
        edges = list(dict.fromkeys(feature.edges))
        with fixed_statistics(outputs, edges, forward.modules) if fix else nullcontext():
            found = gradients_of(first, edges)
        for at_edge in found:
            gradient = feature.gradient(at_edge)
            gradient = None if gradient is None else gradient.movedim(feature.batch_axis, 0)
            if gradient is not None and not bool(torch.isfinite(gradient).all()):
                return None
            if gradient is not None and bool(gradient[1:].any()):
                return True
            decided = decided and gradient is not None and bool(gradient[0].any())
    return False if decided else None
