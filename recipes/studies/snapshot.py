"""A study whose results do not change any more: each figure is computed once, however many tables and charts ask for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ..methods.methods import Method
from .study import Setting, Statistic, Study

_Found = TypeVar("_Found")


class Snapshot(Study):
    """The same as another study, as long as no result is added.

    Args:
        study: which one.
    """

    def __init__(self, study: Study) -> None:
        super().__init__(study.settings, study.seeds, study.tuning_seeds, study.results, study.methods, study.baseline)
        self._known: dict[tuple[Any, ...], Any] = {}
        self._held: list[Setting] = []

    def chosen(self, setting: Setting, method: Method) -> Any:
        """What was chosen."""
        return self._once(setting, ("chosen", method.key), lambda: super(Snapshot, self).chosen(setting, method))

    def reported(self, setting: Setting, method: Method) -> dict[int, dict[str, Any]]:
        """Results by seed."""
        return self._once(setting, ("reported", method.key), lambda: super(Snapshot, self).reported(setting, method))

    def difference(
        self, setting: Setting, method: Method, metrics: Sequence[str], reference: Method | None = None
    ) -> dict[str, Statistic]:
        """Paired differences."""
        key = ("difference", method.key, *metrics, "" if reference is None else reference.key)
        found = super().difference
        return self._once(setting, key, lambda: found(setting, method, metrics, reference))

    def _once(self, setting: Setting, key: tuple[str, ...], compute: Callable[[], _Found]) -> _Found:
        whole = (id(setting), *key)
        if whole not in self._known:
            self._held.append(setting)  # so that no other one gets its id
            self._known[whole] = compute()
        found: _Found = self._known[whole]
        return found
