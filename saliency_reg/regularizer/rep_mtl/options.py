"""The settings of :class:`RepMTL`, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ...torch_tools import check_choice, non_negative_number, positive_number, whole_number
from ..options import CROSS_SAMPLE

#: Options that each process may choose for itself.
_MAY_DIFFER = ("cross_sample", "custom_backward")


@dataclass(frozen=True)
class RepMTLOptions:
    """The settings that :class:`RepMTL` was given and keeps; see there."""

    task_specific_strength: float
    cross_task_strength: float
    temperature: float
    log_losses: bool
    channel_axis: int | None
    batch_axis: int
    start_step: int
    warmup_steps: int
    cross_sample: str
    custom_backward: str

    def __post_init__(self) -> None:
        check_choice("cross_sample", self.cross_sample, CROSS_SAMPLE)
        check_choice("custom_backward", self.custom_backward, ("warn", "ignore"))
        for name, checked in {
            "task_specific_strength": non_negative_number("task_specific_strength", self.task_specific_strength),
            "cross_task_strength": non_negative_number("cross_task_strength", self.cross_task_strength),
            "temperature": positive_number("temperature", self.temperature),
            "log_losses": bool(self.log_losses),
            "start_step": whole_number("start_step", self.start_step),
            "warmup_steps": whole_number("warmup_steps", self.warmup_steps),
        }.items():
            object.__setattr__(self, name, checked)

    @classmethod
    def among(cls, arguments: Mapping[str, Any]) -> RepMTLOptions:
        """Pick the fields among the arguments of a call."""
        return cls(**{field.name: arguments[field.name] for field in fields(cls)})

    def words(self) -> dict[str, Any]:
        """What has to be the same in all processes."""
        words = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _MAY_DIFFER}
        return {**words, "cross_sample='fix'": self.cross_sample == "fix"}
