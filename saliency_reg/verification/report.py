"""What was verified: one row for each check."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

#: Rows, and what each of them says if it has passed.
ROWS = {
    "heads": "heads and feature map were found, and captured in a forward",
    "compiled": "nothing that has to be differentiated twice is compiled",
    "saliency": "the saliency is the gradient of each sample's own output",
    "samples": "no sample changes the outputs of another",
    "reach": "the penalty's gradient reaches the backbone",
    "derivatives": "gradients are derivatives, and the second derivative is whole",
    "surgery": "the gradient of one backward pass is that of an explicit reference",
    "share": "the penalty is neither lost among the losses nor drowns them",
    "fp16": "the saliency does not underflow in half precision",
}
_MOST_WIDTH, _LEAST_WIDTH = 120, 50
_WORDS = {True: "pass", False: "FAIL", None: "-"}


@dataclass(frozen=True)
class Check:
    """One row: ``passed`` is ``None`` for what could not be checked, or is only told."""

    name: str
    passed: bool | None
    found: str
    advice: str = ""


@dataclass(frozen=True)
class VerificationReport:
    """The rows of :func:`verify`, in order; ``print`` shows them as a table.

    Example:
        >>> report = VerificationReport([Check("samples", False, "layer '1' mixes samples", "use LayerNorm")])
        >>> report.passed, report["samples"].advice, [check.name for check in report.failed]
        (False, 'use LayerNorm', ['samples'])
        >>> print(report)
        samples      FAIL  layer '1' mixes samples
                           -> use LayerNorm
        1 of 1 check failed.
    """

    checks: Sequence[Check]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.failed

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if check.passed is False]

    def __iter__(self) -> Iterator[Check]:
        return iter(self.checks)

    def __len__(self) -> int:
        return len(self.checks)

    def __getitem__(self, name: str) -> Check:
        return {check.name: check for check in self.checks}[name]

    def __str__(self) -> str:
        failed = len(self.failed)
        verdict = f"{failed} of {len(self)} check{'s' * (len(self) != 1)} failed." if failed else "No check failed."
        return "\n".join([*table(self.checks), verdict])


def table(checks: Sequence[Check]) -> list[str]:
    """Return the lines of a table that fits the terminal, and 120 columns at most."""
    columns = min(max(shutil.get_terminal_size((100, 24)).columns, _LEAST_WIDTH), _MOST_WIDTH)
    width = max(12, *(len(check.name) for check in checks))
    lines = []
    for check in checks:
        start = f"{check.name:<{width}} {_WORDS[check.passed]:<4}  "
        indent = " " * len(start)
        text = textwrap.wrap(check.found, columns - len(start), break_on_hyphens=False) or [""]
        lines += [start + text[0], *(indent + line for line in text[1:])]
        if check.advice:
            more = textwrap.wrap(check.advice, columns - len(start) - 3, break_on_hyphens=False)
            lines += [f"{indent}-> {more[0]}", *(f"{indent}   {line}" for line in more[1:])]
    return lines
