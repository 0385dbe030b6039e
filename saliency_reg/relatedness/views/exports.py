"""Views as tables and graphs for other tools, and as JSON of our own."""

from __future__ import annotations

import csv
import importlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import Tensor

from ...errors import ConfigurationError, MissingPackageError, WrongTypeError
from .affinity import affinity_of
from .kinds import ViewKind

if TYPE_CHECKING:
    import networkx
    import pandas

PathLike = Union[str, "os.PathLike[str]"]

_FORMAT = "saliency_reg relation views"
_VERSION = 1
#: What XML 1.0 does not have, also escaped.
_NOT_IN_XML = re.compile(r"[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def frame_of(tasks: Sequence[str], matrices: Mapping[str, Tensor], common_labels: Tensor) -> pandas.DataFrame:
    """Return a row for each ordered pair of two tasks."""
    header, *rows = _table(tasks, matrices, common_labels)
    frame: pandas.DataFrame = _need("pandas").DataFrame(rows, columns=header)
    return frame


def write_csv(path: PathLike, tasks: Sequence[str], matrices: Mapping[str, Tensor], common_labels: Tensor) -> None:
    """Write a row for each ordered pair of two tasks, with empty cells for NaN."""
    # Half a surrogate pair in a name cannot be written as it is.
    with open(_writable(path), "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file)
        for row in _table(tasks, matrices, common_labels):
            writer.writerow(["" if cell != cell else cell for cell in row])


def graph_of(
    kind: ViewKind, tasks: Sequence[str], matrix: Tensor, common_labels: Tensor, skill: Tensor | None
) -> networkx.Graph[str]:
    """Return a graph with an edge for each pair whose affinity is known; directed for a view that is not symmetric."""
    library = _need("networkx")
    graph: networkx.Graph[str] = library.Graph() if kind.symmetric else library.DiGraph()
    skills = [None] * len(tasks) if skill is None else skill.tolist()
    counts, values, affinities = common_labels.tolist(), matrix.tolist(), affinity_of(kind, matrix).tolist()
    for place, task in enumerate(tasks):
        own = skills[place]
        graph.add_node(task, labels=counts[place][place], **({} if own is None or own != own else {"skill": own}))
    for i, task in enumerate(tasks):
        for j in range(i if kind.symmetric else len(tasks)):
            weight = affinities[i][j]
            if i != j and weight == weight:
                graph.add_edge(tasks[j], task, weight=weight, value=values[i][j], common_labels=counts[i][j])
    return graph


def write_graphml(path: PathLike, graph: networkx.Graph[str]) -> None:
    """Write a graph, its nodes under names that XML can hold."""
    library, target = _need("networkx"), _writable(path)
    safe = {task: task for task in graph if not _NOT_IN_XML.search(task)}
    for place, task in enumerate(graph):
        if task not in safe:
            name = _NOT_IN_XML.sub("\N{REPLACEMENT CHARACTER}", task)
            while name in safe.values():
                name = f"{name} #{place}"
            safe[task] = name
    graph = library.relabel_nodes(graph, safe)
    library.set_node_attributes(graph, {name: name for name in graph}, "label")
    library.write_graphml(graph, target)


def write_json(path: PathLike, fields: Mapping[str, Any]) -> None:
    """Write tensors, mappings of tensors and lists of names."""
    content = {"format": _FORMAT, "version": _VERSION, **{name: _plain(value) for name, value in fields.items()}}
    _writable(path).write_text(json.dumps(content, allow_nan=False), encoding="utf-8")


def read_json(path: PathLike) -> dict[str, Any]:
    """Return the arguments of :class:`RelationViews`."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigurationError(f"{str(path)!r} is no JSON ({error}). Use a file that to_json wrote.") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ConfigurationError(f"{str(path)!r} is JSON of something else. Use a file that to_json wrote.")
    if (version := content.get("version")) != _VERSION:
        raise ConfigurationError(
            f"{str(path)!r} has version {version!r} of the format, expected {_VERSION}. Use a later saliency_reg."
        )
    try:
        return {
            "tasks": content["tasks"],
            "matrices": {key: _tensor(rows) for key, rows in content["matrices"].items()},
            "common_labels": torch.tensor(content["common_labels"]),
            "trajectory": {key: _tensor(parts) for key, parts in content["trajectory"].items()},
            "skill": None if content["skill"] is None else _tensor(content["skill"]),
        }
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ConfigurationError(f"{str(path)!r} was changed after to_json wrote it ({error!r}).") from error


def _writable(path: PathLike) -> Path:
    """Return where to write, in a folder that exists."""
    if not isinstance(path, (str, os.PathLike)):
        raise WrongTypeError(f"path must be a str or a Path, found {type(path).__name__}.")
    target = Path(path)
    if not target.parent.is_dir() or target.is_dir():
        found = "is a folder" if target.is_dir() else "is in a folder that does not exist"
        raise ConfigurationError(f"path={str(target)!r} {found}. Name a file, in a folder that exists.")
    return target


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {key: _plain(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(own) for own in value]
    return None if value != value else value


def _tensor(rows: Any) -> Tensor:
    def numbers(value: Any) -> Any:
        return [numbers(own) for own in value] if isinstance(value, list) else float("nan" if value is None else value)

    return torch.tensor(numbers(rows), dtype=torch.float64)


def _table(tasks: Sequence[str], matrices: Mapping[str, Tensor], common_labels: Tensor) -> Iterator[list[Any]]:
    yield ["task", "other", *matrices, "common_labels"]
    lists, counts = [matrix.tolist() for matrix in matrices.values()], common_labels.tolist()
    for i, task in enumerate(tasks):
        for j, other in enumerate(tasks):
            if i != j:
                yield [task, other, *(rows[i][j] for rows in lists), counts[i][j]]


def _need(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingPackageError(
            f'{package} could not be imported ({error}). Run: pip install "saliency-reg[relations]"'
        ) from error
