"""Random numbers that depend on a seed and a place alone, and the states of all global generators."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def derived_seed(*parts: int | str) -> int:
    """A seed below ``2**63`` that is another one for other parts, the same in every process and on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_host(seed: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch, but leave GPUs alone, so that it works in data workers."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)


def seed_all(seed: int) -> None:
    """The same, and on all devices."""
    seed_host(seed)
    torch.manual_seed(seed)


def random_state(device: torch.device | None = None) -> dict[str, Any]:
    """States of the global generators, as tensors and plain values; of a GPU, that of ``device``."""
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    state = {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],  # type: ignore[union-attr]
        "torch": torch.get_rng_state(),
    }
    if device is not None and device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def load_random_state(state: dict[str, Any], device: torch.device | None = None) -> None:
    """Go on where :func:`random_state` was taken. A GPU keeps its state if the state was taken without one."""
    version, numbers, following = state["python"]
    random.setstate((version, tuple(numbers), following))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device is not None and device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextlib.contextmanager
def kept_random_state(device: torch.device | None = None) -> Iterator[None]:
    """Whatever is drawn or seeded within leaves no trace."""
    state = random_state(device)
    try:
        yield
    finally:
        load_random_state(state, device)
