"""What tests of all packages share."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

# Before torch is imported, and for child processes: threads of several pytest workers get in each other's way, by a factor.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture
def float64() -> Iterator[None]:
    """Tensors are made in float64, from seed 0."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def _heard() -> Iterator[None]:
    """Recipes that run as commands of their own silence the package, and do not undo it."""
    logger = logging.getLogger("saliency_reg")
    level = logger.level
    yield
    logger.setLevel(level)
