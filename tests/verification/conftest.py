"""How reports are printed in tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wide terminal, so that words are not broken over lines."""
    monkeypatch.setenv("COLUMNS", "120")
