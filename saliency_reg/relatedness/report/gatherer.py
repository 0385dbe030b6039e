"""One update: from a captured forward and its labels straight down to the running sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...capture import CapturedForward
from ...distributed import Ranks
from ...errors import CaptureError, SaliencyRegError, StateMismatchError
from ...torch_tools import StateModule, names_from_bytes, names_to_bytes, real_device, warn_user
from ..views import VIEWS
from .batch_parts import BatchParts, checked_sizes, cosines_of, settled, widths_of
from .fork_gradients import ForkReader
from .kinds import TaskKinds
from .label_tables import LabelTables
from .labels import LabelBatch, Labels, labels_of
from .layout import OutputLayout
from .reruns import Reruns
from .running import RunningSums, Trajectory
from .sources import BackwardHooks, OwnDistances
from .task_losses import LossChoice, TaskLosses

_OF_GRADIENTS = {"gradient_cosine", "tag"}


class Gatherer(StateModule):
    """Gathers; attached to nothing. :class:`RelationReport`, which derives from it, looks at a model."""

    names: tuple[str, ...]
    unusable: Tensor
    task_names: Tensor
    in_a_copy: ClassVar[dict[str, Any]] = {"_last": None}

    def __init__(
        self,
        tasks: Sequence[str],
        ranks: Ranks,
        heads: Sequence[str],
        *,
        named: bool,
        kinds: Mapping[str, str] | Sequence[str] | str | None,
        loss: LossChoice,
        tag_every: int,
        tag_step: float,
        decay: float,
        points: int,
        channel_axis: int | None,
    ) -> None:
        super().__init__()
        self.tasks, self._ranks = tuple(tasks), ranks
        self.tag_every, self.tag_step, self._channel_axis = tag_every, tag_step, channel_axis
        self.kinds = TaskKinds(tasks, kinds)
        self.running = RunningSums(len(tasks), decay)
        self.tables = LabelTables(self.kinds, len(tasks))
        self.trajectory = Trajectory(len(tasks), points)
        self._losses = TaskLosses(tasks, self.kinds, loss)
        self.register_buffer("unusable", torch.zeros(len(tasks), dtype=torch.int64, device=real_device()))
        self.register_buffer("task_names", names_to_bytes(tasks))
        self._fork = ForkReader(tasks, Reruns(heads, named))
        self._hooks_of_others = BackwardHooks(heads)
        self._distances = OwnDistances(tasks, channel_axis)
        self._told: set[str] = set()
        self._last: Tensor | None = None  # distances of the regularizer that were taken up

    def _take_up(self, forward: CapturedForward, labels: Labels) -> None:
        """Take up a forward. All come here together. An error in one process is raised in all, if a device is waited for."""
        problem: SaliencyRegError | None = None
        outputs: dict[int, Tensor] = {}
        batch = LabelBatch.empty(len(self.tasks), forward.device)
        layout = OutputLayout(forward, self.tasks, self._channel_axis)
        try:
            if forward.batch_size:
                outputs = layout.per_task(forward.outputs)
                checked_sizes(outputs, self.tasks, forward.batch_size)
                batch = labels_of(labels, self.tasks, forward.batch_size)
        except SaliencyRegError as error:
            problem, outputs = error, {}
        if self.kinds.settle(batch.to(forward.device), widths_of(outputs), self._ranks):
            self.tables.grow()
        parts = BatchParts(self.tables, len(self.tasks), forward.device)
        tags = "tag" in self.names and self.trajectory.number % self.tag_every == 0
        if problem is None and outputs:
            try:
                # Of labels on a device only where it is waited for in any case.
                self.kinds.check(batch, waits=tags or batch.values.device.type == "cpu")
                batch = batch.to(forward.device)
                self._add(parts, forward, layout, outputs, batch)
            except SaliencyRegError as error:
                problem = error
        self._join(parts, problem, forward, waits=tags or forward.device.type == "cpu")
        self._keep(parts)
        if tags:
            self._look_ahead(parts, batch)
        self.trajectory.note(lambda: self._matrices(self._weights()))

    def _add(
        self,
        parts: BatchParts,
        forward: CapturedForward,
        layout: OutputLayout,
        outputs: Mapping[int, Tensor],
        batch: LabelBatch,
    ) -> None:
        parts.add_labels(self.tables, batch)
        parts.add_outputs(settled(outputs, self.kinds, self.tasks), batch, self._losses, self.running)
        if _OF_GRADIENTS.intersection(self.names):
            self._hooks_of_others.refuse(forward)
            parts.add_gradients(forward, layout, self._fork, self._losses, batch, outputs)
        if "saliency_distance" in self.names and self._weights() is None:
            parts.sums["distances"], parts.sums["distance_samples"] = self._distances.of(forward)

    def _join(
        self, parts: BatchParts, problem: SaliencyRegError | None, forward: CapturedForward, *, waits: bool
    ) -> None:
        if self._ranks.size == 1:
            if problem is not None:
                raise problem
            return
        if problem is not None:
            parts = BatchParts(self.tables, len(self.tasks), forward.device)  # which is all that this one brings
            parts.sums["errors"] += 1
        parts.sums["without_heads"] += forward.no_heads is not None
        parts.part_again(self._ranks.add(parts.joined()))
        if problem is not None:
            raise problem
        if waits and float(parts.sums["errors"]):
            raise CaptureError("the report of another process has refused its batch, for what is said there.")
        if forward.no_heads is not None and float(parts.sums["without_heads"]) == self._ranks.size:
            raise forward.no_heads

    def _keep(self, parts: BatchParts) -> None:
        """Add the sums of all processes to what was kept."""
        sums = parts.sums
        self.tables.add([sums[name] for name in ("common", "sums", "squares", "products")])
        of_batch = ("margins", "losses", "labelled", "both_hard", "both_easy", "one_hard")
        self.running.add(**{name: sums[name] for name in of_batch})
        self.unusable += sums["unusable"].long()
        if "gradient_cosine" in self.names:
            self.running.add_mean("cosine", cosines_of(sums["gramian"]))
        if "saliency_distance" in self.names and self._weights() is None:
            self.running.add_mean("distance", sums["distances"] / sums["distance_samples"])
        if self.unusable.device.type == "cpu":
            self._tell_unusable()

    def _look_ahead(self, parts: BatchParts, batch: LabelBatch) -> None:
        """TAG at the feature map: losses after a step along the gradient of each task, of all processes."""
        length = parts.sums["gramian"].diagonal().clamp(min=0).sqrt()
        steps = self.tag_step * parts.sums["size"].sqrt() / length
        steps = torch.where((length > 0) & steps.isfinite(), steps, 0.0)
        losses = self._ranks.add(parts.losses_after(steps, self._losses, batch))
        gain = 1 - losses[:, 1:] / losses[:, :1]
        known = (losses[:, :1] != 0) & (steps > 0) & (parts.sums["labelled"] > 0).unsqueeze(1)
        self.running.add_mean("gain", torch.where(known, gain, torch.nan))

    def _note_distances(self, distances: Tensor) -> None:
        if "saliency_distance" in self.names and distances is not self._last:
            self._last = distances
            self.running.add_mean("distance", distances.detach().to(self.running.thresholds()))

    def _weights(self) -> Tensor | None:
        """Return the relation weights of a source that has some."""
        raise NotImplementedError

    def _matrices(self, weights: Tensor | None) -> Tensor:
        """Return ``[V, T, T]``, all views as they are now; NaN for those that are not gathered."""
        together, kappa = self.running.agreement()
        own = {
            "saliency_distance": self.running.mean("distance"),
            "relation_weights": torch.full_like(kappa, torch.nan) if weights is None else weights.to(kappa),
            "gradient_cosine": self.running.mean("cosine"),
            "error_cooccurrence": together,
            "error_kappa": kappa,
            "label_correlation": self.tables.association().to(kappa),
            "tag": self.running.mean("gain"),
        }
        # Gradients of different samples have no entry in common: a product of 0 says nothing.
        apart = (self.tables.common == 0).fill_diagonal_(False)
        for name in _OF_GRADIENTS:
            own[name] = own[name].masked_fill(apart.to(own[name].device), torch.nan)
        nothing = torch.full_like(kappa, torch.nan)
        return torch.stack([own[name] if name in self.names else nothing for name in VIEWS])

    def _tell(self, of_itself: Tensor) -> None:
        """Tell of labels that were constant, by what is the association of each with itself."""
        many = self.tables.common.diagonal().cpu() >= 2
        counted = self.kinds.columns.cpu() > 0
        constant = (many & counted & of_itself.isnan()).nonzero().flatten().tolist()
        if constant and "label_correlation" in self.names and "constant" not in self._told:
            self._told.add("constant")
            warn_user(
                f"all labels of {[self.tasks[task] for task in constant][:8]} were the same so far: nothing is known of how "
                "they go together with others, and label_correlation is NaN there."
            )
        self._tell_unusable()

    def _tell_unusable(self) -> None:
        if "unusable" not in self._told and bool(self.unusable.any()):
            self._told.add("unusable")
            found = {task: number for task, number in zip(self.tasks, self.unusable.tolist()) if number}
            warn_user(
                f"outputs were NaN or infinite; such samples are left out of a report, so far "
                f"{dict(list(found.items())[:8])}. Look at the learning rate, and at the inputs of these batches."
            )

    def check_loaded(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Also refuse the state of other tasks."""
        saved = state_dict.get(prefix + "task_names")
        if isinstance(saved, Tensor) and saved.ndim == 1 and not saved.is_meta:
            names = names_from_bytes(saved)
            if names != list(self.tasks):
                raise StateMismatchError(
                    f"the state dict was saved for the tasks {names}, but this report has {list(self.tasks)}. Make it with "
                    "the same tasks in the same order. Nothing was loaded."
                )
        super().check_loaded(state_dict, prefix)
