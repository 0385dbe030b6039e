"""Tries the blocks of docs/your_loop.md, each with its library: with the penalty, with strength 0, and without anything."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
import warnings
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "your_loop.md"


@dataclass(frozen=True)
class Loop:
    """What has to be known of a block: expressions in its names, and the beginning of the names of its backbone."""

    backbone: str
    network: str = "model"
    regularizer: str = "regularizer"
    packages: tuple[str, ...] = ()  # left out: an extra of this package
    plain: dict[str, str] = field(default_factory=dict)  # replaced in the loop without a regularizer


#: By the heading of the section.
LOOPS = {
    "transformers": Loop(
        "bert.encoder",
        plain={
            "SaliencyTrainer(": "Trainer(",
            ", regularizer=regularizer)": ")",
            "TrainingArguments\n": "Trainer, TrainingArguments\n",
        },
    ),
    "accelerate": Loop("0."),
    "timm": Loop("layer4"),
    "Lightning": Loop("backbone", regularizer="model.regularizer", packages=("lightning",)),
    "chemprop": Loop("message_passing", regularizer="model.regularizer", packages=("chemprop",)),
    "DeepCTR-Torch": Loop("expert_dnn", packages=("deepctr-torch", "requests")),
    "torch-rechub": Loop("bottom_mlp", packages=("torch-rechub",)),
    "deepchem": Loop("layers.0", network="model.model", packages=("deepchem",)),
    "TabNet": Loop(
        "tabnet.encoder", network="model.network", regularizer="model.regularizer", packages=("pytorch-tabnet",)
    ),
}


def block_of(library: str) -> str:
    found = re.search(rf"^## {library}\n(?:(?!## )[^\n]*\n)*?```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert found is not None, f"docs/your_loop.md has no block under '## {library}'"
    return found[1]


@dataclass(eq=False)
class Run:
    """A block that has run: its names, its weights at the end, the optimizers that stepped, and what was told."""

    names: dict[str, Any]
    network: Any
    weights: dict[str, Any]
    reached: list[str]  # parameters with a gradient of the first penalty
    steps: int
    optimizers: list[Any]
    told: list[str]

    def traces(self) -> list[Any]:
        """Whatever is set or hooked on modules and optimizers."""

        def of(thing: Any) -> Any:
            return type(thing).__qualname__, sorted(
                (key, len(value) if "hooks" in key else None) for key, value in vars(thing).items()
            )

        modules = [of(module) for name, module in self.network.named_modules() if not name.startswith("regularizer")]
        return modules + [of(optimizer) for optimizer in self.optimizers]


def run(code: str, network: str) -> Run:
    """Run a block in an empty folder, from the same random numbers."""
    import numpy
    import torch
    from torch.nn.modules.module import register_module_forward_hook
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from saliency_reg import SaliencyRegularizer

    stepped: list[Any] = []
    reached: set[int] = set()
    told: list[str] = []

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    logger, handler = logging.getLogger("saliency_reg"), Told()
    logger.addHandler(handler)

    def look_at(module: Any, _: Any, penalty: Any) -> None:
        if isinstance(module, SaliencyRegularizer) and penalty.requires_grad and not reached:
            nodes, leaves = [penalty.grad_fn], {}
            seen = set(nodes)
            while nodes:
                node = nodes.pop()
                leaves |= {id(node.variable): node.variable} if hasattr(node, "variable") else {}
                nodes += (behind := {one for one, _ in node.next_functions if one is not None} - seen)
                seen |= behind
            gradients = torch.autograd.grad(penalty, list(leaves.values()), retain_graph=True, allow_unused=True)
            reached.update(key for key, gradient in zip(leaves, gradients) if gradient is not None and gradient.any())

    hooks = [
        register_optimizer_step_post_hook(lambda optimizer, *_: stepped.append(optimizer)),
        register_module_forward_hook(look_at),
    ]
    before = Path.cwd()
    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(0)
    names: dict[str, Any] = {"__name__": "__main__"}
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
            os.chdir(folder)
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(compile(code, PAGE.name, "exec"), names)
            finally:
                os.chdir(before)
    finally:
        for hook in hooks:
            hook.remove()
        logger.removeHandler(handler)
    module = eval(network, names)
    weights = {name: value.detach().clone() for name, value in module.state_dict().items() if torch.is_tensor(value)}
    optimizers = list({id(optimizer): optimizer for optimizer in stepped}.values())
    told += [str(warning.message) for warning in caught]
    by_name = [name for name, parameter in module.named_parameters() if id(parameter) in reached]
    return Run(names, module, weights, by_name, len(stepped), optimizers, told)


def failures(library: str) -> list[str]:
    """What is wrong with the block of a library; nothing if it is as the page says."""
    loop, code = LOOPS[library], block_of(library)
    plain = "".join(line for line in code.splitlines(True) if "# line " not in line or "SaliencyTrainer" in line)
    for old, new in loop.plain.items():
        assert old in plain, f"{old!r} is not in the block"
        plain = plain.replace(old, new)
    without, off, on = (run(text, loop.network) for text in (plain, code.replace("strength=0.1", "strength=0.0"), code))

    found = [f"told: {text}" for text in on.told if text not in without.told]
    regularizer = eval(loop.regularizer, on.names)
    if without.steps == 0 or on.steps != without.steps:
        found.append(f"{on.steps} optimizer steps, {without.steps} without a regularizer")
    differ = {
        one: [name for name, value in without.weights.items() if not value.equal(one.weights[name])]
        for one in (off, on)
    }
    if changed := differ[off]:
        found.append(f"with strength 0 these differ: {changed[:5]}")
    if not float(regularizer.report.penalty) > 0:
        found.append(f"the penalty is {float(regularizer.report.penalty)}")
    if not any(name.startswith(loop.backbone) for name in set(on.reached) & set(differ[on])):
        found.append(f"the penalty has not reached {loop.backbone}")
    if (moved := int(regularizer.relations.updates)) != on.steps:
        found.append(f"relations moved {moved} times in {on.steps} steps")
    for each in (off, on):
        eval(loop.regularizer, each.names).remove()
        if left := [one for one, other in zip(each.traces(), without.traces()) if one != other]:
            found.append(f"remove() left {left[:2]}")
    return found


def in_its_own_environment(library: str, folder: Path) -> str:
    """One line about a library: installed above the packages of this interpreter, and tried there."""
    packages = LOOPS[library].packages
    python = Path(sys.executable)
    if packages:
        home = folder / library
        venv.create(home, symlinks=True)
        python = home / "bin" / "python"
        ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        packages_of_it = Path(subprocess.check_output(ask, text=True).strip())
        below = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
        (packages_of_it / "below.pth").write_text(below)
        install = [python, "-m", "pip", "install", "-q", "--prefer-binary", *packages]
        done = subprocess.run(install, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"{library}: not installable: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"
    one = [python, __file__, "--here", library]
    done = subprocess.run(
        one, capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
    if done.returncode or not last.startswith("{"):
        return f"{library}: failed: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"
    said = json.loads(last)
    return f"{library} {said['version']}: " + ("ok" if not said["found"] else "failed: " + "; ".join(said["found"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("libraries", nargs="*", metavar="LIBRARY", help=f"all, or some of {', '.join(LOOPS)}")
    parser.add_argument("--here", action="store_true", help="in this environment, and print JSON")
    arguments = parser.parse_args()
    if unknown := set(arguments.libraries) - set(LOOPS):
        parser.error(f"no such libraries: {sorted(unknown)}. Name some of {', '.join(LOOPS)}")
    if arguments.here:
        (library,) = arguments.libraries
        found = failures(library)
        print(json.dumps({"version": metadata.version((*LOOPS[library].packages, library)[0]), "found": found}))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        lines = []
        for library in arguments.libraries or LOOPS:
            lines.append(in_its_own_environment(library, Path(folder)))
            print(lines[-1], flush=True)
    return int(any(": failed: " in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
