"""What the authors of SRDML printed, for tables of its own beside ours: other data, networks and tuning, so never mixed."""

from __future__ import annotations

from collections.abc import Mapping

from .report.options import Published

_POSTER = (
    "Bai and Zhao, Saliency-Regularized Deep Multi-Task Learning, KDD 2022: the table of the poster in the authors' "
    "repository (github.com/BaiTheBest/SRDML), read on 2026-11-29. Per cent; without a number of seeds or deviations. "
)
_METRICS = ("accuracy", "AUC", "precision", "recall")
#: Published names to the keys of our methods that they can stand beside: of Lasso, L21 and RMTL the poster does not say
#: whether features were trained, and of PCGrad and SRDML neither the level nor the relation rule.
BESIDE: Mapping[str, tuple[str, ...]] = {
    "STL": ("single_task",),
    "Hard-Share": ("hard_sharing",),
    "Lasso": ("lasso", "lasso_frozen"),
    "L21": ("l21", "l21_frozen"),
    "RMTL": ("mean_regularised", "mean_regularised_frozen"),
    "MRN": ("mrn",),
    "MMoE": ("mmoe",),
    "PLE": ("ple",),
    "MGDA-UB": ("mgda_ub", "mgda_ub_unit"),
    "PCGrad": ("pcgrad", "pcgrad@parameters"),
    "SRDML": ("srdml_projected", "srdml_authors", "srdml", "srdml_cosine", "srdml_default"),
    "SRDML (w/. PCGrad)": (
        *("srdml+pcgrad", "srdml+pcgrad@parameters"),
        *("srdml_cosine+pcgrad", "srdml_cosine+pcgrad@parameters"),
    ),
}


def _rows(*rows: str) -> dict[str, dict[str, str | float]]:
    return {name: dict(zip(_METRICS, row.split(), strict=True)) for name, row in zip(BESIDE, rows, strict=True)}


#: By the data set that it is about.
PUBLISHED: Mapping[str, Published] = {
    "cifar_mtl": Published(
        "CIFAR-MTL, VGG16 at 64x64",
        f"{_POSTER}CIFAR-10 as ten one-vs-rest tasks: by the authors' code 2,000 training images of each class, all "
        "10,000 test images, VGG16 with weights of ImageNet, a hidden layer of 128 ReLU units in each head, 30 epochs of "
        "hard sharing and 30 of SRDML with Adam. That code prints, for each metric on its own, the highest of all epochs on "
        "the test images.",
        _rows(
            "92.65 66.20 71.32 69.83",
            "94.70 95.56 76.30 72.28",
            "91.48 86.64 68.90 24.74",
            "91.50 87.58 68.01 29.32",
            "92.28 85.65 61.54 28.15",
            "94.51 96.67 79.94 76.95",
            "93.53 93.17 73.42 69.32",
            "94.01 93.32 75.26 70.15",
            "90.74 84.38 57.80 24.10",
            "95.11 96.69 79.03 74.82",
            "95.82 96.43 81.22 75.93",
            "96.03 96.72 82.59 77.01",
        ),
    ),
    "celeba": Published(
        "CelebA",
        f"{_POSTER}Attributes of faces; the authors' code has no training on CelebA, so that tasks, images, network and "
        "steps are not known from it.",
        _rows(
            "86.83 90.96 70.53 60.39",
            "89.24 91.38 71.40 58.84",
            "76.55 66.69 37.38 36.62",
            "76.09 66.12 37.11 36.13",
            "75.52 66.99 37.48 36.74",
            "89.35 91.54 71.51 64.64",
            "77.57 67.84 68.79 58.92",
            "83.21 69.32 70.03 59.72",
            "90.03 92.92 73.42 62.65",
            "90.11 92.87 73.51 62.92",
            "90.15 92.95 73.87 64.91",
            "90.26 93.01 73.93 65.30",
        ),
    ),
}
