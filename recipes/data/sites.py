"""Few kinds of tasks at many sites: the same question asked in several places, each with a few rows of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..runtime.errors import OptionError
from .groups import GroupTable, kept_groups, read_known, split_groups
from .sources import Examples, Splits
from .task_kinds import TaskKind

#: One row in so many of a binary task is positive.
_ROWS_TO_A_POSITIVE = 4


@dataclass(frozen=True)
class SiteSplits:
    """Rows of T tasks, which are K kinds at ``T / K`` sites.

    Attributes:
        tasks: kind of label of each, by name.
        kind_of: which of the K kinds each task is, ``[T]``; only the methods that say so may know it.
        inputs, targets: ``[T, n, D]`` and ``[T, n]``, for training: numbers in units of their spread.
        validation, test: with labels of all T tasks.
    """

    tasks: Mapping[str, TaskKind]
    kind_of: Tensor
    inputs: Tensor
    targets: Tensor
    validation: Examples
    test: Examples

    @property
    def same_kind(self) -> Tensor:
        """``[T, T]``, 1 where two tasks are of one kind, 0 on the diagonal."""
        same = (self.kind_of.unsqueeze(0) == self.kind_of.unsqueeze(1)).double()
        return same.fill_diagonal_(0)


def split_by_sites(splits: Splits, *, sites: int, rows: int, seed: int) -> SiteSplits:
    """Give each kind of task, at each of so many sites, so many of its rows; no two sites of a kind have a row in common.

    A binary task has one positive row in four, at least two.

    Args:
        splits: of the kinds.
        sites: of each kind.
        rows: of each task.
        seed: of the draw.

    Raises:
        OptionError: there are too few rows.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen, targets = [], []
    for column, (name, kind) in enumerate(splits.kinds.items()):
        own = splits.train.labels[:, column]
        known = torch.nonzero(~torch.isnan(own)).squeeze(1)
        known = known[torch.randperm(len(known), generator=generator)]
        parts = [(known, rows)]
        if kind.name == "binary":
            positives = min(max(2, rows // _ROWS_TO_A_POSITIVE), rows)
            parts = [(known[own[known] == 1], positives), (known[own[known] == 0], rows - positives)]
        for part, count in parts:
            if len(part) < sites * count:
                raise OptionError(
                    f"{name} has {len(part)} training rows where {sites} sites with {count} each need {sites * count}. Use "
                    "fewer --sites or --rows."
                )
        index = torch.cat([part[: sites * count].view(sites, count) for part, count in parts], dim=1)
        chosen.append(index)
        targets.append((own[index] - kind.mean) / kind.spread)
    # Site by site, so that the order of the tasks says nothing of their kinds to whoever reads neighbours as alike.
    index, count = torch.stack(chosen, dim=1).flatten(0, 1), len(splits.kinds)
    kind_of = torch.arange(count).repeat(sites)
    return SiteSplits(
        {f"{name}, site {site + 1}": kind for site in range(sites) for name, kind in splits.kinds.items()},
        kind_of,
        splits.train.inputs.flatten(1)[index],
        torch.stack(targets, dim=1).flatten(0, 1),
        *(
            Examples(part.inputs.flatten(1), part.labels[:, kind_of], part.rows)
            for part in (splits.validation, splits.test)
        ),
    )


def school_sites(*, sites: int, rows: int, validation_rows: int, seed: int) -> SiteSplits:
    """Language scores at so many schools, and at as many others arithmetic scores with the sign turned: two kinds of tasks.

    So pupils who do well have high values at some schools, and low ones at others.

    Args:
        sites: schools of each kind, drawn for a seed.
        rows, validation_rows: of each school; all its other rows are for testing.
        seed: of the draw.

    Raises:
        OptionError: fewer schools have so many rows.
    """
    language, arithmetic = read_known("bdf", None), read_known("bdf_arithmetic", None)
    kept = torch.tensor(kept_groups(language, rows + validation_rows))
    if len(kept) < 2 * sites:
        raise OptionError(
            f"{2 * sites} schools with {rows} training and {validation_rows} validation rows were asked for, but "
            f"{len(kept)} have so many. Use fewer --sites or --rows."
        )
    drawn = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))]
    tables = (
        _of_groups(language, drawn[:sites]),
        _of_groups(replace(arithmetic, targets=-arithmetic.targets), drawn[sites : 2 * sites]),
    )
    parts = [split_groups(table, rows=rows, validation_rows=validation_rows, seed=seed) for table in tables]

    def examples(inputs: Tensor, targets: Tensor, tasks: Tensor) -> Examples:
        labels = torch.full((len(inputs), 2 * sites), torch.nan)
        labels[torch.arange(len(inputs)), tasks] = targets
        return Examples(inputs, labels, tuple(range(len(inputs))))

    own = [torch.arange(sites).repeat_interleave(validation_rows) for _ in parts]
    return SiteSplits(
        {
            f"{name}, school {part.names[site]}": TaskKind("number", unit=part.variance**0.5)
            for site in range(sites)
            for name, part in zip(("language", "arithmetic"), parts)
        },
        torch.arange(2).repeat(sites),
        torch.stack([part.train.inputs for part in parts], dim=1).flatten(0, 1),
        torch.stack([part.train.targets for part in parts], dim=1).flatten(0, 1),
        examples(
            torch.cat([part.validation.inputs.flatten(0, 1) for part in parts]),
            torch.cat([part.validation.targets.flatten() for part in parts]),
            torch.cat([2 * site + kind for kind, site in enumerate(own)]),
        ),
        examples(
            torch.cat([part.test_inputs for part in parts]),
            torch.cat([part.test_targets for part in parts]),
            torch.cat([2 * part.test_groups + kind for kind, part in enumerate(parts)]),
        ),
    )


def _of_groups(table: GroupTable, groups: Tensor) -> GroupTable:
    """The rows of some groups."""
    chosen = torch.isin(table.groups, groups)
    names, own = torch.unique(table.groups[chosen], return_inverse=True)
    return replace(
        table,
        values=table.values[chosen],
        targets=table.targets[chosen],
        groups=own,
        names=tuple(table.names[group] for group in names.tolist()),
    )
