"""Rep-MTL (Wang, Li and Xu, ICCV 2025): two penalties on the saliencies of the task losses at the shared feature map.

Read in this order: ``rep_mtl`` (:class:`RepMTL`, attached to a model), ``loss_penalties`` (one call), ``joined_terms`` (from
saliencies to the two terms of the joined batch of all processes), ``terms`` (the formulas); then ``options`` (the settings)
and ``loss_reach`` (which tells if the backbone learns nothing).
"""

from .rep_mtl import RepMTL

__all__ = ["RepMTL"]
