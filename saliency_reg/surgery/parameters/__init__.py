"""Gradient surgery on the parameters that the tasks share, with one backward pass per task.

Read in this order: ``parameter_surgery`` (the public class), ``losses`` (of a call, checked), ``shared_parameters``
(which parameters more than one task reaches), ``agreement`` (what all processes have to know alike), ``task_gradients``
(gradients of single tasks: taken, combined, written).
"""

from .parameter_surgery import ParameterSurgery

__all__ = ["ParameterSurgery"]
