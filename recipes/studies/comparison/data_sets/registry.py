"""All data sets by their name; one is added in a file of its own, and here."""

from __future__ import annotations

from ..problem import DataSet
from .images import CELEBA, CIFAR, DIGITS
from .tables import GROUPS, SARCOS, SCHOOL, SYNTHETIC, TOX21
from .texts import GO_EMOTIONS

DATA_SETS: dict[str, DataSet] = {
    own.key: own for own in (DIGITS, CIFAR, CELEBA, GO_EMOTIONS, SARCOS, SCHOOL, GROUPS, TOX21, SYNTHETIC)
}
