"""A Trainer for batches of one task each, and what it evaluates."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saliency_reg.integrations.transformers import SaliencyTrainer

from ..data.task_kinds import TaskKind
from ..data.texts.task_batches import TaskBatches
from ..runtime.errors import need
from ..training.metrics import selection_score, task_scores

__all__ = ["Examined", "SetTrainer", "latest_checkpoint", "scores_on"]

_transformers = need("transformers")
_EVALUATION_FACTOR = 4


@dataclass(frozen=True)
class Examined:
    """Examples of one task that a model is measured on.

    Attributes:
        kind: of the task.
        encodings: inputs of each example.
        labels: ``[N]``.
    """

    kind: TaskKind
    encodings: Sequence[Mapping[str, Any]]
    labels: Tensor


def scores_on(
    model: Any, examined: Mapping[str, Examined], collate: Callable[[Any], Any], batch_size: int
) -> dict[str, dict[str, float]]:
    """Scores of each task on its own examples."""
    training = model.training
    model.eval()
    try:
        return {
            task: task_scores(
                _outputs(model, task, own.encodings, collate, batch_size), own.labels.unsqueeze(1), {task: own.kind}
            )[task]
            for task, own in examined.items()
        }
    finally:
        model.train(training)


@torch.no_grad()
def _outputs(
    model: Any, task: str, encodings: Sequence[Mapping[str, Any]], collate: Callable[[Any], Any], batch_size: int
) -> Tensor:
    # Texts of like length together: less padding.
    order = sorted(range(len(encodings)), key=lambda row: len(encodings[row]["input_ids"]))
    found = []
    for start in range(0, len(order), batch_size):
        batch = collate([encodings[row] for row in order[start : start + batch_size]])
        inputs = {name: value.to(model.device) for name, value in batch.items()}
        found.append(model(**inputs, tasks=[task]).logits[task].float().cpu())
    joined = torch.cat(found).reshape(len(order), -1)
    return joined[torch.tensor(order).argsort()]


class SetTrainer(SaliencyTrainer):
    """A :class:`SaliencyTrainer` on batches of one task each, which measures each task on its own examples.

    Args:
        args: for the Trainer.
        batches: of the training examples.
        examined: validation examples; none for a training that is not evaluated.
        stops: asked after each step: true to save and end.
        kwargs: of :class:`SaliencyTrainer`.
    """

    def __init__(
        self,
        *args: Any,
        batches: TaskBatches,
        examined: Mapping[str, Examined],
        stops: Callable[[], bool],
        **kwargs: Any,
    ) -> None:
        self._batches = batches
        self._examined = examined
        super().__init__(*args, eval_dataset=dict(examined) or None, **kwargs)
        self.remove_callback(_transformers.PrinterCallback)
        self.add_callback(_Course(batches, stops))

    def get_train_dataloader(self) -> Any:
        """Of whole batches, which are not cut again."""
        loader = torch.utils.data.DataLoader(
            self.train_dataset, batch_sampler=self._batches, collate_fn=self.data_collator
        )
        return self.accelerator.prepare(loader)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:  # noqa: ARG002  # of Trainer
        """``eval_score``, and the scores of each task as ``eval_TASK_SCORE``."""
        batch_size = _EVALUATION_FACTOR * self._batches.batch_size
        scores = scores_on(self.model, self._examined, self.data_collator, batch_size)
        kinds = {task: own.kind for task, own in self._examined.items()}
        diverged = any(math.isnan(own[kinds[task].score]) for task, own in scores.items())
        metrics = {"eval_score": -math.inf if diverged else selection_score(scores, kinds)}
        metrics.update({f"eval_{task}_{name}": value for task, own in scores.items() for name, value in own.items()})
        shown = ", ".join(f"{name.removeprefix('eval_')} {value:.3f}" for name, value in metrics.items())
        print(f"step {self.state.global_step} of {self.state.max_steps}, validation: {shown}", flush=True)
        self.log(dict(metrics))
        trainer: Any = self
        trainer.control = trainer.callback_handler.on_evaluate(self.args, self.state, trainer.control, metrics)
        return metrics


class _Course(_transformers.TrainerCallback):  # type: ignore[misc,name-defined]
    """Tells the batches their epoch, and ends the training where it is asked to."""

    def __init__(self, batches: TaskBatches, stops: Callable[[], bool]) -> None:
        self._batches = batches
        self._stops = stops

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        # Before the batches of the epoch are drawn, in every version of Trainer, resumed or not.
        steps = -(-len(self._batches) // args.gradient_accumulation_steps)
        self._batches.set_epoch(state.global_step // steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if self._stops():
            control.should_save = control.should_training_stop = True


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest one that was written to its end: a Trainer writes its own state last."""
    found = []
    for path in folder.glob("checkpoint-*"):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if match := re.fullmatch(r"checkpoint-(\d+)", path.name):
            found.append((int(match[1]), path))
    return max(found)[1] if found else None
