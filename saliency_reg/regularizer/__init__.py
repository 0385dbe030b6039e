"""The plug-in itself.

Read in this order: ``regularizer`` (:class:`SaliencyRegularizer`, attached to a model and an optimizer), ``penalty`` (one
call, straight down ``_penalty_of``, whose lines lead to the files here and in other packages), ``options`` (the settings).
Then what a call asks: ``strength`` (how strong now), ``task_sample`` (which tasks now), ``sample_mixing`` (do heads mix
samples?), ``reach`` (does the penalty reach the backbone?), ``reminders`` (what is told once). ``state`` is what outlives a
call: checked before it is loaded, and carried over where tasks come and go. ``earlier_pickles`` finds the modules that
pickles of earlier versions name. ``rep_mtl`` is a plug-in beside it, with other penalties on the saliencies of losses.
"""

import sys

from .earlier_pickles import FinderOfMovedModules
from .reach import HeadForm
from .regularizer import SaliencyRegularizer
from .rep_mtl import RepMTL
from .strength import LEAST_SHARE, MOST_SHARE, strength_advice

__all__ = ["LEAST_SHARE", "MOST_SHARE", "HeadForm", "RepMTL", "SaliencyRegularizer", "strength_advice"]

sys.meta_path.append(FinderOfMovedModules())
