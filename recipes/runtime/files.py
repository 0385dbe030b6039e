"""The folder of a run, and what belongs into every results.json."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

#: In the folder of a run. It stays there: who removes it may remove that of another process.
LOCK = ".lock"


def new_run_folder(parent: Path, name: str | None) -> Path:
    """Create ``parent/name``; without a name, one after the present time.

    Raises:
        FileExistsError: the name is taken.
    """
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    # Two runs may begin within a second.
    for own in [name] if name is not None else [stamp, *(f"{stamp}_{number}" for number in range(2, 100))]:
        with contextlib.suppress(FileExistsError):
            (parent / own).mkdir(parents=True)
            return parent / own
    raise FileExistsError(f"{parent / (name or stamp)} exists. Give the run a name of its own with --name.")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within, no other process can have the folder; the lock ends with the process and its data workers, however they end.

    Raises:
        BlockingIOError: another one has it.
        OSError: nothing can be written there.
    """
    with contextlib.ExitStack() as held:
        if sys.platform != "win32":
            import fcntl

            file = held.enter_context((folder / LOCK).open("a", encoding="utf-8"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise
            except OSError:
                pass  # some file systems have no locks
        yield


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write plain values as :func:`write_text` does."""
    write_text(path, json.dumps(finite(content), indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write at once or not at all, so that a run that is stopped leaves the previous version whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # Ctrl-C may come right after the replacement
        raise


def finite(value: Any) -> Any:
    """The same for JSON, which has no NaN and no infinity: null in their place."""
    if isinstance(value, Mapping):
        return {str(key): finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def now() -> str:
    """Date and time in UTC, as in ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


#: Whose versions are noted, if they are there.
_PACKAGES = (
    "saliency-reg",
    "scikit-learn",
    "numpy",
    "torchjd",
    "accelerate",
    "timm",
    "datasets",
    "transformers",
    "tokenizers",
)


def versions() -> dict[str, str]:
    """Of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}  # with its build, such as +cpu
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def machine() -> dict[str, str | int | None]:
    """The kind of machine, without its name."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {"processor": model, "cores": os.cpu_count(), "system": platform.system()}
