"""Each test begins and ends without what accelerate keeps for the whole process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .support import fresh_state


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    with fresh_state():
        yield
