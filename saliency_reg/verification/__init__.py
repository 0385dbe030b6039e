"""A proof kit on a user's own model.

Read ``kit`` first (:func:`verify`), then ``subject`` (the model, run again and again from the same state) and ``unchanged``
(which puts everything back). The rows are in ``saliency_checks``, ``gradient_checks``, ``surgery_check`` (with
``parameter_level``) and ``figures``; ``culprits`` finds the layer to name, and what is compiled. ``__main__`` is the command
``python -m saliency_reg.verification``.
"""

from .kit import verify
from .report import Check, VerificationReport

__all__ = ["Check", "VerificationReport", "verify"]
