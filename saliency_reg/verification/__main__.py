"""``python -m saliency_reg.verification package.module:function``, where the function returns ``(model, batch)``."""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError, SaliencyRegError
from ..regularizer import SaliencyRegularizer
from ..torch_tools import users_place
from .kit import verify

_ADVICE = "Name a function that returns (model, batch), or a dict of the arguments of verify: package.module:function."
_HELP = """Check on your model and a batch that the penalty is what it should be.

Name a function, package.module:function, that returns (model, batch), or a dict of the arguments of verify:

    def checked():
        return {"model": model, "batch": x, "heads": "heads", "strength": 0.1, "losses": losses}
"""
_CODES = (
    "exit codes: 0 no check failed, 1 a check failed, 2 the model could not be made or the arguments cannot be used"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 if no check failed, 1 if one did, 2 if the model could not be made or the arguments cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m saliency_reg.verification",
        description=_HELP,
        epilog=_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", help="package.module:function, or, with --trust, a file that torch.save wrote")
    parser.add_argument("--trust", action="store_true", help="load the file, which runs code that is in it")
    given = parser.parse_args(arguments)
    try:
        return 0 if verify(**_arguments(_found(given.what, given.trust))).passed else 1
    except SaliencyRegError as error:
        said = f"{type(error).__name__}: {error}"
    except Exception as error:  # of the model on this batch
        said = f"the model and the batch cannot be used: {_said(error)}"
    print(" ".join(said.split()), file=sys.stderr)
    return 2


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}{users_place(error)}"


def _found(what: str, trust: bool) -> Any:
    """Return what was named: what a function returns, or a file holds."""
    module, _, function = what.partition(":")
    if module.endswith(".py"):
        name = ".".join(Path(module).with_suffix("").parts).lstrip("./")
        raise ConfigurationError(
            f"{what!r} names a file, expected a module. Leave out .py: {name}:{function or 'function'}."
        )
    return _from_file(what, trust) if Path(what).is_file() else _from_function(what)


def _from_function(what: str) -> Any:
    module, _, function = what.partition(":")
    if not module or not function:
        raise ConfigurationError(f"{what!r} is no file, and names no function. {_ADVICE}")
    sys.path.insert(0, "")  # modules beside the user, as with python -m
    try:
        made = getattr(importlib.import_module(module), function)
    except Exception as error:  # also what the module itself raises
        raise ConfigurationError(f"{what!r} cannot be imported: {_said(error)}. {_ADVICE}") from error
    if not callable(made):
        return made
    try:
        return made()
    except Exception as error:
        raise ConfigurationError(f"{what!r} raised {_said(error)}.") from error


def _from_file(path: str, trust: bool) -> Any:
    if not trust:
        raise ConfigurationError(
            f"{path!r} is a file, and loading a pickled model runs whatever code is in it. Pass --trust if you wrote it, or "
            "name a function that builds the model and loads its state dict: package.module:function."
        )
    import torch

    sys.path.insert(0, "")  # classes in modules beside the user
    try:
        return torch.load(path, weights_only=False)
    except Exception as error:
        raise ConfigurationError(
            f"{path!r} cannot be loaded: {type(error).__name__}: {error}. Run it where the model's classes can be imported "
            "from a module (not __main__), or name a function that builds the model: package.module:function."
        ) from error


def _arguments(found: Any) -> dict[str, Any]:
    if isinstance(found, Mapping) and {"model", "batch"} <= set(found):
        known = {*inspect.signature(verify).parameters, *inspect.signature(SaliencyRegularizer).parameters} - {
            "options"
        }
        for name in found:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, 1)
                meant = f" Did you mean {near[0]!r}?" if near else ""
                raise ConfigurationError(f"verify has no option {name!r}.{meant}")
        return dict(found)
    if isinstance(found, (tuple, list)) and len(found) == 2:
        return {"model": found[0], "batch": found[1]}
    raise ConfigurationError(f"found {type(found).__name__}, expected (model, batch) or a dict with both. {_ADVICE}")


if __name__ == "__main__":
    sys.exit(main())
