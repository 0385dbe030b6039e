"""Penalties on the weights of the heads: the classical regularizers of multi-task learning.

Read in this order: ``head_penalty`` (:class:`HeadPenalty`, the public class), ``head_weights`` (which weights of the model),
``proximal`` (lasso and L21: values, and the steps that make exact zeros), ``task_covariance`` (MRN and MTRL: the covariance
of the tasks, in closed form). Nothing here knows of saliencies or of a forward: weights are all that is read.
"""

from .head_penalty import HeadPenalty

__all__ = ["HeadPenalty"]
