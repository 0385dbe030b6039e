"""Five views of the relations between tasks, gathered during a normal training.

Read in this order: ``relation_report`` (:class:`RelationReport`), ``gatherer`` (one update, straight down ``_take_up``),
``labels`` and ``kinds`` (what the user gives), ``task_losses`` (loss, margin and slope of each sample), ``batch_parts``
(what a batch adds), ``layout``, ``fork_gradients`` and ``reruns`` (gradients at the feature map, and heads after a step
along them), ``label_tables`` and ``running`` (what is kept), ``sources`` (who has the hooks).
"""

from .relation_report import RelationReport, relation_report

__all__ = ["RelationReport", "relation_report"]
