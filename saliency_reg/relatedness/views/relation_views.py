"""The views of one training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import ConfigurationError, TaskError
from ...tasks import check_task_names
from ...torch_tools import check_choice, non_negative_number, share_below_one, whole_number
from .affinity import affinity_of, closeness_of, consensus_of, filled
from .checks import checked_counts, checked_matrices, checked_skill, refuse_unknown
from .exports import PathLike, frame_of, graph_of, read_json, write_csv, write_graphml, write_json
from .kinds import VIEWS, ViewKind
from .linkage import average_linkage
from .notes import note_on_chance, notes_on, tasks_at_chance
from .page import page_of
from .pairs import ClosePair, closest_pairs_of
from .ranks import rank_correlations_of

if TYPE_CHECKING:
    import networkx
    import pandas


@dataclass(frozen=True, eq=False)
class RelationViews:
    """Views of the relations between the tasks of one training.

    Attributes:
        tasks: their names, T of them.
        matrices: ``{view: [T, T]}``, float64 on the CPU, keys of :data:`VIEWS`, in its order; NaN where nothing is known of
            a pair (tasks whose labels were never seen together, a task that was always absent). Diagonals are those of the
            view's definition. ``tag[i, j]``: what a step along the gradient of task ``j`` does for the loss of task ``i``.
        common_labels: ``[T, T]`` int64, samples that have labels of both tasks; the diagonal counts those of each.
        trajectory: ``{view: [S, T, T]}``, the view over S parts of the training (or of the samples), from which intervals
            are made; may be empty.
        skill: ``[T]``, of each task one minus its mean loss over that of the best constant guess: 0 is chance level; NaN
            where unknown.

    Raises:
        WrongTypeError, ShapeError, TaskError: what is no tensor, of another shape, or no two different names.
        NonFiniteError: infinite entries.
        ConfigurationError: unknown views, entries outside of the range of their view, a matrix that is not symmetric.

    Example:
        >>> views = RelationViews(
        ...     ("cat", "dog", "car"),
        ...     {"gradient_cosine": torch.tensor([[1, 0.8, -0.2], [0.8, 1, 0], [-0.2, 0, 1]])},
        ...     common_labels=torch.full((3, 3), 100),
        ... )
        >>> [round(value, 3) for value in views.affinity("gradient_cosine")[0].tolist()]
        [1.0, 0.9, 0.4]
        >>> [(pair.task, pair.other, round(pair.value, 3)) for pair in views.closest_pairs("gradient_cosine", count=2)]
        [('cat', 'dog', 0.8), ('dog', 'car', 0.0)]
        >>> views.order()
        ('cat', 'dog', 'car')
    """

    tasks: tuple[str, ...]
    matrices: Mapping[str, Tensor]
    common_labels: Tensor
    trajectory: Mapping[str, Tensor] = field(default_factory=dict)
    skill: Tensor | None = None

    def __post_init__(self) -> None:
        tasks = tuple(check_task_names(self.tasks))
        matrices = checked_matrices(self.matrices, tasks)
        trajectory = checked_matrices(self.trajectory, tasks, of="trajectory", parts=True)
        if extra := [key for key in trajectory if key not in matrices]:
            raise ConfigurationError(f"trajectory has {extra}, which are not among the matrices {list(matrices)}.")
        counts, skill = checked_counts(self.common_labels, tasks), checked_skill(self.skill, tasks)
        for name, value in (
            *(("tasks", tasks), ("matrices", matrices), ("common_labels", counts)),
            *(("trajectory", trajectory), ("skill", skill)),
        ):
            object.__setattr__(self, name, value)

    def __getitem__(self, view: str) -> Tensor:
        """Return the matrix ``[T, T]`` of a view as it was found."""
        check_choice("view", view, tuple(self.matrices))
        return self.matrices[view]

    def __iter__(self) -> Iterator[str]:
        """Yield the keys of the views there are."""
        return iter(self.matrices)

    def __contains__(self, view: object) -> bool:
        return view in self.matrices

    def affinity(self, view: str, *, fill: float | None = None) -> Tensor:
        """Return ``[T, T]`` float64, symmetric, in ``[0, 1]``, larger where tasks are closer: what groups are made from.

        A distance becomes ``1 - D / max D``; cosine, correlation and kappa ``(1 + x) / 2``; co-occurrence stays; weights are
        divided by the largest one between two tasks, and TAG's mean of both directions is scaled linearly from the smallest
        to the largest one between two tasks, both with a diagonal of 1. Scales differ between views: compare affinities by
        their ranks (:meth:`rank_correlations`), not by their size.

        Args:
            view: one of :data:`VIEWS` that was gathered.
            fill: the affinity of pairs of which the view knows nothing, in ``[0, 1]``. Default: they raise an error.

        Raises:
            ConfigurationError: a view that there is not, a ``fill`` outside of ``[0, 1]``.
            NonFiniteError: pairs of which the view knows nothing; names them.
        """
        matrix = self[view]
        return self._without_gaps(affinity_of(VIEWS[view], matrix), f"the view {view!r}", fill)

    def consensus(self, *, fill: float | None = None) -> Tensor:
        """Return ``[T, T]``, the mean over the views of each pair's rank, 0 for the last and 1 for the closest pair.

        Ranks, since the scales of the views have nothing to do with each other; each view counts once, and a pair has the
        mean over the views that know it. The diagonal is 1; ``fill`` and errors as in :meth:`affinity`.
        """
        return self._without_gaps(consensus_of(self._closeness(), len(self.tasks)), "any view", fill)

    def order(self) -> tuple[str, ...]:
        """Return the tasks in one order for all pictures, in which related ones are neighbours.

        By average linkage of the :meth:`consensus`, in which pairs that no view knows have the rank in the middle. Ties
        are decided by the given order.
        """
        return tuple(self.tasks[place] for place in average_linkage(self.consensus(fill=0.5))[1])

    def subset(self, tasks: Sequence[str]) -> RelationViews:
        """Return the views among some tasks, in the order in which they are named here: ``views.subset(views.order())``."""
        names = check_task_names(tasks)
        if unknown := [name for name in names if name not in self.tasks]:
            raise TaskError(f"subset names {unknown}, which are not tasks. The tasks are {list(self.tasks)}.")
        places = torch.tensor([self.tasks.index(name) for name in names])

        def among(matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {key: matrix[..., places[:, None], places] for key, matrix in matrices.items()}

        return replace(
            self,
            tasks=tuple(names),
            matrices=among(self.matrices),
            common_labels=self.common_labels[places[:, None], places],
            trajectory=among(self.trajectory),
            skill=None if self.skill is None else self.skill[places],
        )

    def closest_pairs(self, view: str, count: int = 10, level: float = 0.95) -> list[ClosePair]:
        """Return the ``count`` closest pairs that a view knows, the closest first.

        Args:
            view: one of :data:`VIEWS` that was gathered.
            count: how many at most.
            level: of the interval, in ``(0, 1)``: quantiles ``(1 - level) / 2`` and ``(1 + level) / 2`` of the pair's values
                over its trajectory. Over bootstrap batches that is a confidence interval; over parts of a training it says
                how far the value has moved, and the value of the whole training need not be inside.

        Raises:
            WrongTypeError, ConfigurationError: a view that there is not, a count below 1, a level outside of (0, 1).
        """
        matrix, count = self[view], whole_number("count", count, least=1)
        if share_below_one("level", level) == 0:
            raise ConfigurationError("level must be in (0, 1), found 0. Use level=0.95.")
        parts = self.trajectory.get(view)
        return closest_pairs_of(VIEWS[view], matrix, parts, self.common_labels, self.tasks, count, float(level))

    def rank_correlations(self) -> Tensor:
        """Return ``[V, V]``, Spearman's rank correlation between each two views, over the pairs of tasks that both know.

        A pair of tasks counts once, of TAG with the mean of both directions. Signs are such that views which agree on who is
        close have 1, also a distance with an affinity. NaN where fewer than three pairs are known to both views, and for a
        view that says the same of all pairs.
        """
        return rank_correlations_of(self.pair_values())

    def pair_values(self) -> Tensor:
        """Return ``[V, T (T - 1) / 2]``: of each view the closeness of all pairs, in the order of ``torch.triu_indices``.

        Larger is closer: a distance has its sign turned. NaN where nothing is known.
        """
        row, column = torch.triu_indices(len(self.tasks), len(self.tasks), 1)
        rows = [matrix[row, column] for matrix in self._closeness()]
        return torch.stack(rows) if rows else torch.empty(0, len(row), dtype=torch.float64)

    @property
    def kinds(self) -> tuple[ViewKind, ...]:
        """How each view is to be read, and its label for people."""
        return tuple(VIEWS[key] for key in self.matrices)

    @property
    def at_chance(self) -> tuple[str, ...]:
        """The tasks whose skill is 0 or less, as far as it is known."""
        return tasks_at_chance(self.tasks, self.skill)

    @property
    def chance_note(self) -> str | None:
        """One sentence if tasks are at chance level, as pictures have it in their titles."""
        return note_on_chance(self.tasks, self.skill)

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know before believing the views: tasks at chance level, tasks and pairs of which nothing was seen."""
        return notes_on(self.tasks, self.matrices, self.common_labels, self.skill)

    def to_frame(self) -> pandas.DataFrame:
        """Return a table with a row for each ordered pair of two tasks: ``task``, ``other``, a column for each view, and
        ``common_labels``.

        ``frame.pivot(index="task", columns="other", values="tag")`` is a matrix again. Needs the extra ``relations``.
        """
        return frame_of(self.tasks, self.matrices, self.common_labels)

    def to_csv(self, path: PathLike) -> None:
        """Write the table of :meth:`to_frame`, with empty cells where nothing is known; needs no package."""
        write_csv(path, self.tasks, self.matrices, self.common_labels)

    def to_json(self, path: PathLike) -> None:
        """Write everything, to be read by :meth:`from_json` without loss; ``null`` where nothing is known."""
        fields = ("matrices", "common_labels", "trajectory", "skill")
        write_json(path, {"tasks": self.tasks, **{name: getattr(self, name) for name in fields}})

    @classmethod
    def from_json(cls, path: PathLike) -> RelationViews:
        """Read what :meth:`to_json` wrote. Raises a :class:`ConfigurationError` for any other file."""
        return cls(**read_json(path))

    def to_networkx(self, view: str) -> networkx.Graph[str]:
        """Return a graph with a node for each task, and an edge for each pair that the view knows.

        Edges have ``weight``, the :meth:`affinity`, in which larger is closer (as communities and layouts want it),
        ``value``, the entry of the view, and ``common_labels``; nodes have ``labels``, how many were seen, and ``skill``
        where it is known. TAG is a ``DiGraph``: the edge from ``j`` to ``i`` has ``tag[i, j]`` as its value, what ``j`` does
        for ``i``. Needs the extra ``relations``.
        """
        matrix = self[view]
        return graph_of(VIEWS[view], self.tasks, matrix, self.common_labels, self.skill)

    def to_graphml(self, path: PathLike, view: str) -> None:
        """Write the graph of :meth:`to_networkx` for Gephi, Cytoscape or yEd.

        Characters of task names that XML does not have become U+FFFD.
        """
        write_graphml(path, self.to_networkx(view))

    def to_html(self, pairs: int = 5) -> str:
        """Return a part of a page: notes, a heat map of each view, the ``pairs`` closest pairs of each, rank correlations.

        It needs nothing from elsewhere, and names are escaped. Orange is close in all maps; distances, too, are darkest
        where tasks are closest.
        """
        return page_of(self, whole_number("pairs", pairs, least=1))

    def _repr_html_(self) -> str:
        return self.to_html()

    def __repr__(self) -> str:
        parts = sorted({len(matrix) for matrix in self.trajectory.values()})
        return (
            f"{type(self).__name__}({len(self.tasks)} tasks, views {', '.join(self.matrices) or 'none'}"
            f"{f', over {parts[-1]} parts' if parts else ''})"
        )

    def _closeness(self) -> list[Tensor]:
        return [closeness_of(VIEWS[key], matrix) for key, matrix in self.matrices.items()]

    def _without_gaps(self, affinity: Tensor, what: str, fill: float | None) -> Tensor:
        if fill is None:
            advice = (
                "Use views.subset([...]) without these tasks, or fill= with the affinity that such pairs shall have."
            )
            refuse_unknown(affinity, self.tasks, what, advice)
            return affinity
        if non_negative_number("fill", fill) > 1:
            raise ConfigurationError(f"fill must be an affinity in [0, 1], found {fill}.")
        return filled(affinity, float(fill))
