"""The plug-in itself.

Read in this order: ``penalty`` (one call, straight down: each line of ``_penalty_of`` is a file here or in another package),
``regularizer`` (:class:`SaliencyRegularizer`: the same, attached to a model and an optimizer), ``options`` (its settings).
Then what a call asks: ``strength`` (how strong now), ``task_sample`` (which tasks now), ``sample_mixing`` (do heads mix
samples?), ``reach`` (does the penalty reach the backbone?), ``reminders`` (what is told once). ``saved_state`` checks a
state dict before it is loaded; ``earlier_pickles`` finds the modules that pickles of earlier versions name.
"""

import sys

from .earlier_pickles import FinderOfMovedModules
from .regularizer import SaliencyRegularizer

__all__ = ["SaliencyRegularizer"]

sys.meta_path.append(FinderOfMovedModules())
