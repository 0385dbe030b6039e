"""Checkpoints on disk: written at once or not at all, checked before they are trusted, and kept a few deep."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..runtime.errors import CheckpointError

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d{8,})")
#: What a killed write or removal leaves. What is set aside as ".unusable-" is kept for whoever wants to look at it.
_LEFTOVERS = (".writing-", ".removed-")
_REPLACED = ".replaced-"
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training, of which the newest are kept: folders ``checkpoint-00000120``, after the step."""

    folder: Path
    keep: int = 2

    def save(self, step: int, parts: Mapping[str, Any], about: Mapping[str, Any]) -> Path:
        """Write a checkpoint, and then remove what is older than the ones to keep.

        Args:
            step: names it; one of the same name is replaced.
            parts: file name to tensors and plain values, in lists, tuples and dictionaries.
            about: a few plain values for the manifest.

        Raises:
            OSError: it could not be written, for instance because the disk is full. Nothing is left of it, and the others
                are as they were.
        """
        name = f"checkpoint-{step:08d}"
        final, aside = self.folder / name, self.folder / f"{_REPLACED}{name}"
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".writing-{name}-", dir=self.folder))
        try:
            temporary.chmod(0o755)  # mkdtemp lets nobody else read it
            files = {f"{part}.pt": _write(temporary / f"{part}.pt", content) for part, content in parts.items()}
            manifest = {"step": step, **about, "torch": str(torch.__version__), "files": files}
            # Last, and flushed after all others: a folder with a manifest was written to its end.
            _write(temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
            _settle_folder(temporary)
            if final.exists():
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(final, aside)
            os.replace(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            if aside.exists() and not final.exists():
                os.replace(aside, final)
            raise
        with contextlib.suppress(OSError):  # it is there, whatever happens to the old ones
            _settle_folder(self.folder)
            self.clean()
            for old in self.all()[: -self.keep]:
                _remove(old)
        return final

    def all(self) -> list[Path]:
        """The folders that look like checkpoints, oldest first."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((path for path in found if _NAME.fullmatch(path.name) and path.is_dir()), key=step_of)

    def newest(self, complain: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that is whole, and its manifest. Newer ones are set aside, each with a complaint why.

        Raises:
            OSError: one is there, but cannot be read now.
        """
        candidates = self.all()
        for path in reversed(candidates):
            try:
                return path, check(path)
            except CheckpointError as error:
                complain(f"{error} It is set aside, and an older checkpoint takes its place.")
                aside = path.with_name(f".unusable-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(path, aside)
        if candidates:
            complain(f"no checkpoint in {self.folder} is whole: the training starts from the beginning.")
        return None

    def clean(self) -> None:
        """Remove what writes that were killed have left; one that was killed between two renames is undone."""
        for path in list(self.folder.glob(f"{_REPLACED}*")):
            original = self.folder / path.name.removeprefix(_REPLACED)
            if original.exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.replace(path, original)
        for prefix in _LEFTOVERS:
            _remove_like(self.folder, prefix)

    def remove_all(self) -> None:
        """Remove every checkpoint, for a training whose result is kept elsewhere."""
        for path in self.all():
            _remove(path)
        self.clean()
        _remove_like(self.folder, ".unusable-")


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint.

    Raises:
        CheckpointError: it has another name.
    """
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is no checkpoint. Pass the path of a folder such as checkpoint-00000120.")
    return int(match.group(1))


def check(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all as they were written.

    Raises:
        CheckpointError: naming the file that is missing, truncated or changed.
        OSError: the file is there, but cannot be read now.
    """
    manifest_path = path / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(manifest_path.read_text(encoding="utf-8"))
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{manifest_path} cannot be read ({type(error).__name__}: {error}).") from error
    for name, (size, checksum) in files.items():
        file = path / name
        try:
            found = file.stat().st_size
            if found != size:
                raise CheckpointError(f"{file} is truncated or was changed: it has {found} bytes instead of {size}.")
            if _checksum(file) != checksum:
                raise CheckpointError(f"{file} was changed: its checksum is not that of the manifest.")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CheckpointError(f"{file} cannot be read ({error.strerror}).") from error
    return manifest


def load(path: Path, part: str) -> Any:
    """One part of a checkpoint, on the CPU. No code in the file is run.

    Raises:
        CheckpointError: it cannot be read.
    """
    file = path / f"{part}.pt"
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, for a file that is not what it should be
        raise CheckpointError(f"{file} cannot be loaded ({type(error).__name__}: {error}).") from error


class _File(io.BufferedWriter):
    """A new file that notes its checksum, and why it could not be written."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "x"))
        self.checksum = hashlib.sha256()
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
        except OSError as error:
            self.failure = error
            raise
        self.checksum.update(data)
        return written


def _write(path: Path, content: Any) -> dict[str, Any]:
    with _File(path) as file:
        try:
            if isinstance(content, bytes):
                file.write(content)
            else:
                torch.save(content, file)
        except Exception as error:
            if file.failure is not None and error is not file.failure:
                raise file.failure from error  # torch reports its own writer instead
            raise
        file.flush()
        os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": file.checksum.hexdigest()}


def _settle_folder(path: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not every file system can
            raise
    finally:
        os.close(handle)


def _checksum(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest()


def _remove(path: Path) -> None:
    # Hidden first: a removal that is killed half-way must not leave a checkpoint without files.
    hidden = path.with_name(f".removed-{path.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _remove_like(folder: Path, prefix: str) -> None:
    for path in list(folder.glob(f"{prefix}*")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
