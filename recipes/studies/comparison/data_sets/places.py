"""Where data are, and whether they are still the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ....runtime.errors import DataError


def folder_of(place: str, *names: str) -> str:
    """The first folder or file of these names in a place, or the place itself, which may be an id on the hub."""
    found = (Path(place, name) for name in names)
    return str(next((own for own in found if own.exists()), place))


def file_digest(files: Iterable[Path], expected: str) -> str:
    """Of the content of files, to tell results on other data apart.

    Args:
        files: that may be there.
        expected: what should have been there.

    Raises:
        DataError: there is none.
    """
    there = sorted(path for path in files if path.is_file())
    if not there:
        raise DataError(f"found no {expected}. Pass the folder that has it as --folder.")
    digest = hashlib.sha256()
    for path in there:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def no_fingerprint(place: Any) -> str:
    """Of data that are made here, or come with a package."""
    del place
    return ""
