"""``python -m saliency_reg.verification package.module:function``, where the function returns ``(model, batch)``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError, SaliencyRegError
from .kit import verify

_ADVICE = "Name a function that returns (model, batch), or a dict of the arguments of verify: package.module:function."


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 if no check failed, 1 if one did, 2 if the model could not be made or the arguments cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m saliency_reg.verification", description=__doc__)
    parser.add_argument("what", help="package.module:function, or, with --trust, a file that torch.save wrote")
    parser.add_argument("--trust", action="store_true", help="load the file, which runs code that is in it")
    given = parser.parse_args(arguments)
    try:
        found = _from_file(given.what, given.trust) if Path(given.what).is_file() else _from_function(given.what)
        return 0 if verify(**_arguments(found)).passed else 1
    except SaliencyRegError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2


def _from_function(what: str) -> Any:
    module, _, function = what.partition(":")
    if not module or not function:
        raise ConfigurationError(f"{what!r} is no file, and names no function. {_ADVICE}")
    sys.path.insert(0, "")  # modules beside the user, as with python -m
    try:
        made = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"{what!r} cannot be imported: {error}. {_ADVICE}") from error
    return made() if callable(made) else made


def _from_file(path: str, trust: bool) -> Any:
    if not trust:
        raise ConfigurationError(
            f"{path!r} is a file, and loading a pickled model runs whatever code is in it. Pass --trust if you wrote it, or "
            "name a function that builds the model and loads its state dict: package.module:function."
        )
    import torch

    return torch.load(path, weights_only=False)


def _arguments(found: Any) -> dict[str, Any]:
    if isinstance(found, Mapping) and {"model", "batch"} <= set(found):
        return dict(found)
    if isinstance(found, (tuple, list)) and len(found) == 2:
        return {"model": found[0], "batch": found[1]}
    raise ConfigurationError(f"found {type(found).__name__}, expected (model, batch) or a dict with both. {_ADVICE}")


if __name__ == "__main__":
    sys.exit(main())
