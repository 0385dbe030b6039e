"""What several trainings say of the relations between their tasks: mean views, groups, and how far the trainings agree."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saliency_reg import GroupStability, RelationViews, ViewComparison, compare_views

from .chance import clear_of_chance
from .grouping import groups_of, stretched

#: The keys of all views, as ``--view`` has them.
VIEW_NAMES = (
    *("saliency_distance", "relation_weights", "gradient_cosine", "error_cooccurrence", "error_kappa"),
    *("label_correlation", "tag"),
)
#: What groups are made of by default: it knows of labels that no sample has together, and of those that exclude each other.
DEFAULT_VIEW = "saliency_distance"
#: In its place if it says something else in each training, and some labels occur together.
SECOND_VIEW = "gradient_cosine"
#: Rank correlation of a view with itself in another training up to which it is noise.
NOISE = 0.3
#: Views that know of tasks without a label in common.
WITHOUT_COMMON_LABELS = ("saliency_distance", "relation_weights")
#: Adjusted Rand indices between trainings from which on they are said to agree, and how.
_AGREEMENT = ((0.999, "agree on them entirely"), (0.75, "agree on most of them"), (0.4, "agree on some of them"))
_MOST_NAMED = 8


@dataclass(frozen=True)
class Group:
    """Labels that belong together.

    Attributes:
        tasks: their names.
        inside, outside: mean affinity of pairs in the group, and of its tasks to others, where the farthest pair has 0 and
            the closest 1; NaN without such a pair.
        together: in which share of the trainings a pair of them is in one group, mean over the pairs; NaN if not known.
    """

    tasks: tuple[str, ...]
    inside: float
    outside: float
    together: float


@dataclass(frozen=True)
class Findings:
    """What the trainings say.

    Attributes:
        trainings: how many there are.
        views: means over the trainings, which are the parts of the trajectory; skill is how far scores on test samples are
            above chance, and at most 0 where that is not clear.
        comparison: of the views of the trainings.
        view: key of the view that the groups are of.
        groups: the largest first.
        given: whether their number was given.
        stability: of groups of the single trainings, as many in each; ``None`` with one training.
        says: whether test scores are clearly above chance.
        score: on test samples, mean over tasks and trainings.
        kept_after: epochs that the views are from.
    """

    trainings: int
    views: RelationViews
    comparison: ViewComparison
    view: str
    groups: tuple[Group, ...]
    given: bool
    stability: GroupStability | None
    says: bool
    score: float
    kept_after: tuple[int, ...]

    @property
    def label(self) -> str:
        """Name of the view, for people."""
        return label_of(self.views, self.view)

    @property
    def unknown(self) -> int:
        """Pairs of which the view knows nothing."""
        return int(self.views[self.view].isnan().triu(1).sum())

    @property
    def fill(self) -> float:
        """What these count with."""
        return fill_of(self.views, self.view)

    @property
    def several(self) -> list[Group]:
        """Groups of more than one label."""
        return [group for group in self.groups if len(group.tasks) > 1]

    @property
    def clear(self) -> bool:
        """Whether there is something to say on which the trainings agree."""
        return self.says and self.stability is not None and self.stability.adjusted_rand >= _AGREEMENT[-1][0]

    @property
    def sentence(self) -> str:
        """The answer."""
        count = len(self.views.tasks)
        if not self.says:
            return (
                f"Nothing can be said: the model is at chance level on test samples (mean score {self.score:.3f}), and what "
                "it shows of its tasks is noise. Label correlation alone does not depend on it."
            )
        if len(self.groups) == 1:
            found = f"By {self.label}, no split of the {count} labels is worth it: they are one group."
        elif not self.several:
            found = f"By {self.label}, no two of the {count} labels are close enough to be a group."
        else:
            alone = len(self.groups) - len(self.several)
            one = "1 label belongs" if alone == 1 else f"{alone} labels belong"
            rest = f"; {one} to no other" if alone else ""
            named = "; ".join(_named(group.tasks) for group in self.several[:_MOST_NAMED])
            number = f"{len(self.several)} group{'s' if len(self.several) > 1 else ''}"
            found = f"By {self.label}, {count} labels make {number}: {named}{rest}."
        return f"{found} {self._stable()}"

    def _stable(self) -> str:
        if self.stability is None:
            return "One training does not tell how stable that is: pass --seeds 3 or more."
        index = self.stability.adjusted_rand
        said = next((text for least, text in _AGREEMENT if index >= least), "hardly agree: do not build on them")
        return (
            f"The {self.trainings} trainings {said} (adjusted Rand index {index:.2f}; 0 is chance, 1 the same groups)."
        )


def findings(results: Sequence[Mapping[str, Any]], view: str | None, groups: int | None) -> Findings:
    """Put the results of at least one training together.

    Args:
        results: of :func:`.cells.train_related`, of the same tasks.
        view: of which groups are made; by default as :func:`chosen_view` chooses.
        groups: how many; by default as :func:`.grouping.groups_of` chooses.
    """
    each = [views_of(result) for result in results]
    tasks = each[0].tasks
    parts = {name: torch.stack([own[name] for own in each]) for name in each[0]}
    counts = torch.stack([own.common_labels for own in each]).double().mean(0).round().long()
    mean = RelationViews(tasks, {name: own.nanmean(0) for name, own in parts.items()}, counts, parts, _skill(results))
    comparison = compare_views(each)
    view = view or chosen_view(mean, comparison)
    affinity = stretched(affinity_of(mean, view))
    found, stability = groups_of(affinity, [stretched(affinity_of(own, view)) for own in each], tasks, groups)
    described = [_described(group, tasks, affinity, stability) for group in found]
    of_means = [result["chance"]["mean"] for result in results]
    return Findings(
        len(each),
        mean,
        comparison,
        view,
        tuple(sorted(described, key=lambda group: -len(group.tasks))),
        groups is not None,
        stability,
        clear_of_chance([_number(above) for above, _ in of_means], [_number(spread) for _, spread in of_means]),
        statistics.fmean(_number(result["macro"]["score"]) for result in results),
        tuple(int(result["kept_after"]) for result in results),
    )


def views_of(result: Mapping[str, Any]) -> RelationViews:
    """The views of one training, out of JSON; NaN where no sample had both labels, for views that need it."""
    counts = torch.tensor(result["common_labels"])
    apart = (counts == 0) & ~torch.eye(len(counts), dtype=torch.bool)
    matrices = {}
    for name, rows in result["views"].items():
        matrix = torch.tensor([[_number(value) for value in row] for row in rows], dtype=torch.float64)
        # Gradients of different samples have no entry in common: their products are 0, which says nothing.
        matrices[name] = matrix if name in WITHOUT_COMMON_LABELS else matrix.masked_fill(apart, math.nan)
    return RelationViews(tuple(result["tasks"]), matrices, counts)


def chosen_view(mean: RelationViews, comparison: ViewComparison) -> str:
    """The view that groups are made of: saliency distance, or gradient cosine where that one is noise and this one is not.

    Not where all labels exclude each other: there gradients are opposed the most where labels are alike.
    """
    again = dict(zip(comparison.views, comparison.over_seeds.tolist()))
    off = ~torch.eye(len(mean.tasks), dtype=torch.bool)
    occur_together = bool((mean["label_correlation"][off] > 0).any())
    if occur_together and again[DEFAULT_VIEW] < NOISE <= again[SECOND_VIEW]:
        return SECOND_VIEW
    return DEFAULT_VIEW


def affinity_of(views: RelationViews, view: str) -> Tensor:
    """``[T, T]``, with the mean of what is known for pairs of which the view knows nothing: neither close nor far."""
    return views.affinity(view, fill=fill_of(views, view))


def fill_of(views: RelationViews, view: str) -> float:
    """The mean affinity of the pairs that a view knows; one half if it knows none."""
    known = views.affinity(view, fill=0.0)[~views[view].isnan() & ~torch.eye(len(views.tasks), dtype=torch.bool)]
    return float(known.mean()) if len(known) else 0.5


def label_of(views: RelationViews, view: str) -> str:
    """Name of a view within a sentence."""
    label = next(kind.label for kind in views.kinds if kind.key == view)
    return label if label.startswith("TAG") else label[0].lower() + label[1:]


def rank_rows(comparison: ViewComparison) -> list[list[str]]:
    """A table of the rank correlations between views, mean and deviation over the trainings, for people."""

    def cell(mean: float, std: float) -> str:
        if math.isnan(mean):
            return "-"
        return f"{mean:.2f}" if math.isnan(std) else f"{mean:.2f} +- {std:.2f}"

    names = [name.replace("_", " ") for name in comparison.views]
    rows = [["view", "itself again", *names]]
    for place, name in enumerate(names):
        pairs = zip(comparison.mean[place].tolist(), comparison.std[place].tolist())
        cells = ["" if other == place else cell(*pair) for other, pair in enumerate(pairs)]
        rows.append([name, cell(float(comparison.over_seeds[place]), math.nan), *cells])
    return rows


def _described(
    group: tuple[str, ...], tasks: tuple[str, ...], affinity: Tensor, stability: GroupStability | None
) -> Group:
    inside = torch.tensor([task in group for task in tasks])
    pairs = (inside.unsqueeze(1) & inside).triu(1)
    across = inside.unsqueeze(1) & ~inside
    together = math.nan if stability is None else float(stability.together[pairs].mean())
    return Group(group, float(affinity[pairs].mean()), float(affinity[across].mean()), together)


def _skill(results: Sequence[Mapping[str, Any]]) -> Tensor:
    """``[T]``: how far scores are above chance, at most 0 where that is not clear."""
    found = []
    for task in range(len(results[0]["tasks"])):
        above = [_number(result["chance"]["above"][task]) for result in results]
        spread = [_number(result["chance"]["spread"][task]) for result in results]
        known = [value for value in above if math.isfinite(value)]
        mean = statistics.fmean(known) if known else math.nan
        found.append(mean if clear_of_chance(above, spread) else min(mean, 0.0))
    return torch.tensor(found, dtype=torch.float64)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)  # JSON has no NaN


def _named(tasks: Sequence[str]) -> str:
    more = f" and {len(tasks) - _MOST_NAMED} more" if len(tasks) > _MOST_NAMED else ""
    return f"{', '.join(tasks[:_MOST_NAMED])}{more}"
