"""Tables of molecules as SMILES, with columns of 0 and 1 of which some cells may be empty, and their fingerprints."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runtime.errors import DataError, OptionError, need
from .label_columns import check_columns, labels_of
from .own_table import read_frame
from .sources import Examples, Splits
from .task_kinds import BINARY

#: Bonds around each atom that a fingerprint describes.
RADIUS = 2
#: Of the draw of the test molecules, which are the same for all seeds of a study.
_TEST_SEED = 0
#: Draws of validation or test molecules that are tried.
_MOST_DRAWS = 100


@dataclass(frozen=True)
class MoleculeTable:
    """Where molecules are.

    Attributes:
        path: of a CSV, TSV or parquet file.
        smiles: its column of SMILES.
        tasks: columns of labels; by default all that have nothing but 0, 1 and empty cells.
        missing: texts that stand for a missing label, beside empty cells.
    """

    path: str
    smiles: str = "smiles"
    tasks: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Molecules:
    """What a table has.

    Attributes:
        tasks: names.
        inputs: ``[N, bits]``.
        labels: ``[N, T]``, NaN where one is missing.
        rows: of each molecule in the table.
        unreadable: SMILES that rdkit cannot read, by row; they are left out.
        left_out: columns that are no tasks, and why.
    """

    tasks: tuple[str, ...]
    inputs: Tensor
    labels: Tensor
    rows: tuple[int, ...]
    unreadable: Mapping[int, str]
    left_out: Mapping[str, str]


def count_fingerprints(smiles: Sequence[str], bits: int) -> tuple[Tensor, list[int]]:
    """Morgan fingerprints with the logarithm of one plus each count, and the indices of the SMILES that rdkit can read.

    Args:
        smiles: of the molecules.
        bits: that the substructures are hashed into.

    Returns:
        ``[N, bits]`` and N indices.
    """
    chemistry, numpy = need("rdkit.Chem"), need("numpy")
    generator = need("rdkit.Chem.rdFingerprintGenerator").GetMorganGenerator(radius=RADIUS, fpSize=bits)
    with need("rdkit.rdBase").BlockLogs():  # on what cannot be read, which is told by the caller
        found = [chemistry.MolFromSmiles(text) if text.strip() else None for text in smiles]
    kept = [index for index, molecule in enumerate(found) if molecule is not None]
    counts = [generator.GetCountFingerprintAsNumPy(found[index]) for index in kept]
    stacked = numpy.stack(counts) if counts else numpy.zeros((0, bits))
    return torch.from_numpy(stacked.astype("float32")).log1p(), kept


@functools.lru_cache(maxsize=2)
def read_molecules(table: MoleculeTable, bits: int) -> Molecules:
    """Read a table, find its tasks, and compute the fingerprints, once in each process.

    Raises:
        DataError: a file or columns that cannot be used, or no molecule that can be read.
    """
    frame, _ = read_frame(Path(table.path), table.smiles)
    frame.columns = [str(name) for name in frame.columns]
    columns = list(frame.columns)
    check_columns([table.smiles], columns, table.path, "Pass the column of the molecules as --smiles.")
    check_columns(table.tasks, columns, table.path)
    texts = ["" if value is None else str(value) for value in frame[table.smiles].tolist()]
    inputs, kept = count_fingerprints(texts, bits)
    if not kept:
        raise DataError(
            f"rdkit can read none of the {len(texts)} molecules in the column {table.smiles!r} of {table.path}, such as "
            f"{texts[0]!r}. Pass the column of SMILES as --smiles."
        )
    known, left_out = _labels(frame.iloc[kept], table)
    if len(known) < 2:
        reasons = "".join(f" {name!r}: {why}." for name, why in left_out.items())
        raise DataError(
            f"{table.path} has {len(known)} column(s) of 0 and 1 that can be tasks, and relations need two.{reasons}"
        )
    unreadable = {row: texts[row] for row in sorted(set(range(len(texts))) - set(kept))}
    return Molecules(tuple(known), inputs, torch.stack(list(known.values()), 1), tuple(kept), unreadable, left_out)


def molecule_splits(
    molecules: Molecules, *, seed: int, labels: int, labelled: str, validation_share: float, test_share: float
) -> Splits:
    """Draw training, validation and test molecules. Those with the same fingerprint are in the same split, and each task has
    both labels in validation and test.

    The test molecules are the same for every seed. A hyper-parameter that was chosen with one seed has therefore never seen
    the test molecules of another.

    Args:
        molecules: to draw from.
        seed: of the draw of training and validation molecules, and of the labels.
        labels: of each task in training.
        labelled: ``"one"``: each training molecule has the label of one task; ``"all"``: so many molecules with all
            labels that they have.
        validation_share, test_share: of the molecules.

    Raises:
        OptionError: more labels than there are, or a task too rare to be scored.
    """
    if labelled not in ("one", "all"):
        raise OptionError(f"found labelled={labelled!r}. Use one or all.")
    _, groups = torch.unique(molecules.inputs, dim=0, return_inverse=True)
    count = len(groups)
    rest, test = _drawn(molecules, groups, torch.arange(count), round(count * test_share), _TEST_SEED)
    pool, validation = _drawn(molecules, groups, rest, round(count * validation_share), seed)
    known = ~torch.isnan(molecules.labels[pool])
    if labelled == "all":
        if labels > len(pool):
            raise OptionError(
                f"{labels} training molecules were asked for, but there are {len(pool)}. Use fewer labels."
            )
        train, kept = pool[:labels], known[:labels]
    else:
        own = _one_label_each(known, labels)
        train = pool[own >= 0]
        kept = own[own >= 0].unsqueeze(1) == torch.arange(len(molecules.tasks))

    def examples(rows: Tensor, shown: Tensor | None = None) -> Examples:
        own = molecules.labels[rows]
        own = own if shown is None else torch.where(shown, own, torch.nan)
        return Examples(molecules.inputs[rows], own, tuple(rows.tolist()))

    kinds = dict.fromkeys(molecules.tasks, BINARY)
    return Splits(kinds, examples(train, kept), examples(validation), examples(test))


def fingerprint(tables: Mapping[str, MoleculeTable]) -> str:
    """Of the files and of what is read from them, to tell results on other data apart.

    Raises:
        DataError: there are none.
    """
    digest = hashlib.sha256()
    found = [table for table in tables.values() if Path(table.path).is_file()]
    if not found:
        places = " or ".join(table.path for table in tables.values())
        raise DataError(
            f"found no file {places}. Pass the folder that has tox21.parquet and sider.parquet, or a --table."
        )
    for table in found:
        digest.update(Path(table.path).read_bytes())
        digest.update(repr((table.smiles, table.tasks, table.missing)).encode())
    return digest.hexdigest()[:12]


def _labels(frame: Any, table: MoleculeTable) -> tuple[dict[str, Tensor], dict[str, str]]:
    found: dict[str, Tensor] = {}
    left_out: dict[str, str] = {}
    for name in table.tasks or [name for name in frame.columns if name != table.smiles]:
        why, labels = None, torch.empty(0)
        try:
            _, labels, _ = labels_of(name, frame[name].tolist(), "binary", table.missing)
        except DataError as error:
            why = str(error).partition(". ")[0].partition(", expected")[0]  # the advice is for other recipes
        own = labels[~torch.isnan(labels)]
        if why is None and (not len(own) or own.min() == own.max()):
            why = f"all of its {len(own)} labels are the same"
        if why is None:
            found[name] = labels
        elif name in table.tasks:
            raise DataError(
                f"the task {name!r} of {table.path} cannot be learned: {why}, expected 0, 1 and empty cells. Pass other "
                "--tasks, or name what stands for a missing label after --missing-value."
            )
        else:
            left_out[name] = why
    return found, left_out


def _drawn(molecules: Molecules, groups: Tensor, rows: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows in an order of chance: those that are left, and about as many as asked for; each group is in one part.

    Drawn again until each task can be scored: it has both labels among those that were asked for.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(_MOST_DRAWS):
        order = rows[torch.randperm(len(rows), generator=generator)]
        drawn = torch.isin(groups[order], groups[order[:count]])
        labels = molecules.labels[order[drawn]]
        scored = (labels == 0).any(0) & (labels == 1).any(0)
        if scored.all():
            return order[~drawn], order[drawn]
    rare = molecules.tasks[int((~scored).nonzero()[0])]
    raise OptionError(
        f"{count} of {len(rows)} molecules were to be drawn for validation or test, but the task {rare!r} is too rare for "
        "both labels to be among them. Use larger shares, or leave the task out of --tasks."
    )


def _one_label_each(known: Tensor, labels: int) -> Tensor:
    """``[N]``, the task of each row, -1 for those that are left: in turn each task takes the next row that has its label.

    Args:
        known: ``[N, T]``, which labels there are.
        labels: of each task.
    """
    own = torch.full((len(known),), -1)
    tasks = known.sum(0).argsort(stable=True).tolist()  # the rarest labels first
    for taken in range(labels):
        for task in tasks:
            free = torch.nonzero(known[:, task] & (own < 0))
            if not len(free):
                raise OptionError(
                    f"{labels} labels for each of {len(tasks)} tasks were asked for, each of another molecule, but the "
                    f"{len(known)} training molecules have only about {taken}. Use fewer labels, or --labelled all."
                )
            own[free[0]] = task
    return own
