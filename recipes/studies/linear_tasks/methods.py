"""The methods that learn the linear tasks, and the settings that are tried for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...methods.attach import MGDA_UB, PCGRAD, Surgery

__all__ = ["METHODS", "SHARED_BASELINE", "SINGLE_TASK", "Method", "Setting"]


@dataclass(frozen=True)
class Setting:
    """Hyper-parameters of one trial; what does not apply is ``None``."""

    strength: float | None = None
    temperature: float | None = None
    relation_rate: float | None = None
    """Learning rate of the relations."""
    learning_rate: float | None = None
    """Of Adam, where it is tuned."""

    def __str__(self) -> str:
        names = {
            "strength": self.strength,
            "temperature": self.temperature,
            "relation rate": self.relation_rate,
            "learning rate": self.learning_rate,
        }
        return ", ".join(f"{name} {value:g}" for name, value in names.items() if value is not None) or "-"


@dataclass(frozen=True)
class Method:
    """A way to learn the tasks, and the settings that are tried on the tuning seeds."""

    key: str
    label: str
    settings: tuple[Setting, ...] = ()
    """Empty for the closed forms, whose one hyper-parameter is chosen on the validation split of every seed."""
    rule: str | None = None
    """Relation rule of SRDML; without one there is no regularizer."""
    metric: str = "l1"
    shared_layer: bool = False
    surgery: Surgery | None = None

    @property
    def shares_nothing(self) -> bool:
        """Whether the tasks are learned apart."""
        return self.rule is None and not self.shared_layer


def _half_decades(first: int) -> tuple[float, ...]:
    """Twelve values from ``10 ** first`` on."""
    return tuple(factor * 10.0 ** (first + decade) for decade in range(6) for factor in (1, 3))


def _srdml() -> tuple[Method, ...]:
    methods = []
    rates = (3e-4, 1e-3, 3e-3, 1e-2)
    for metric, uniform, strengths, temperatures, projected_rates in (
        ("l1", _half_decades(-3), (1.0, 3.0, 10.0), (0.05, 0.07, 0.1, 0.2), rates),
        (
            "sqchordal",
            _half_decades(-1),
            (100.0, 300.0, 1000.0),
            (0.1, 0.3, 1.0, 3.0),
            (1e-7, 1e-6, 1e-5, 1e-4),
        ),
    ):
        per_rule = {
            "entropic": [Setting(strength, temperature=value) for value in temperatures for strength in strengths],
            "projected": [
                Setting(strength, relation_rate=value) for value in projected_rates for strength in strengths
            ],
            "authors": [Setting(strength, relation_rate=value) for value in rates for strength in strengths],
            "fixed": [Setting(strength) for strength in uniform],
        }
        for rule, settings in per_rule.items():
            name = "uniform weights" if rule == "fixed" else rule
            methods.append(Method(f"{metric}_{rule}", f"SRDML, {metric}, {name}", tuple(settings), rule, metric))
    return tuple(methods)


def _learning_rates(values: Sequence[float]) -> tuple[Setting, ...]:
    return tuple(Setting(learning_rate=value) for value in values)


def _with_shared_layer() -> tuple[Method, ...]:
    """Laid out by validation errors of the seeds 1000 to 1002, at more values than these."""
    rates = _learning_rates((0.002, 0.003, 0.005, 0.015))
    strengths = tuple(
        Setting(strength, temperature=temperature, learning_rate=0.2)
        for temperature in (0.2, 0.5)
        for strength in (3.0, 10.0)
    )

    def method(key: str, label: str, surgery: Surgery | None = None, rule: str | None = None) -> Method:
        settings = rates if rule is None else strengths
        return Method(f"shared_{key}", f"Shared layer, {label}", settings, rule, shared_layer=True, surgery=surgery)

    return (
        method("hard", "hard sharing"),
        *(method(key, surgery.label, surgery) for key, surgery in {**PCGRAD, "mgda_ub": MGDA_UB}.items()),
        method("l1_entropic", "SRDML, l1, entropic", rule="entropic"),
        *(method(f"srdml_{key}", f"SRDML w/ {surgery.label}", surgery, "entropic") for key, surgery in PCGRAD.items()),
    )


_LEARNING_RATES = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.07, 0.1, 0.2, 0.3, 0.5)
SINGLE_TASK = ("single_adam", "single_ridge")
#: The one that surgery is to be compared with.
SHARED_BASELINE = "shared_hard"
METHODS = {
    method.key: method
    for method in (
        Method("single_adam", "Single-task, early stopping", _learning_rates(_LEARNING_RATES)),
        Method("single_ridge", "Single-task, ridge"),
        Method("mean_regularised", "Mean-regularised (RMTL)"),
        Method("pooled", "One pooled regressor"),
        *_srdml(),
        *_with_shared_layer(),
    )
}
