"""Tables as users have them, made of what scikit-learn brings along: features, texts and images, each with 12 labels."""

import csv
import re
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn import datasets

ROWS = 300
#: Words of the texts, of each of which a label says whether it is there.
WORDS = (
    *("data", "class", "features", "mean", "number", "attribute"),
    *("values", "analysis", "dataset", "learning", "computed", "information"),
)


def write(path, rows):
    with Path(path).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def breast_cancer(path, *, rows=ROWS, mixed=False, seed=0):
    """Measurements of cells. Labels: the diagnosis, and 11 measurements, as above their median or (mixed) of all kinds.

    Returns the path, the columns of features, and those of labels.
    """
    found = datasets.load_breast_cancer()
    chosen = np.random.default_rng(seed).permutation(len(found.data))[:rows]
    values, names = found.data[chosen], [name.replace(" ", "_") for name in found.feature_names]
    measured = [*range(20, 30), 4]
    features = [names[column] for column in range(20) if column not in measured]
    table = []
    for row in range(rows):
        own = {names[column]: f"{values[row, column]:.5g}" for column in range(20) if column not in measured}
        own["benign"] = str(found.target[chosen[row]])
        for place, column in enumerate(measured):
            value, known = values[row, column], values[:, column]
            own[f"label_{names[column]}"] = _label(value, known, place % 3 if mixed else 0)
        table.append(own)
    labels = ["benign", *(f"label_{names[column]}" for column in measured)]
    return write(path, table), features, labels


def _label(value, known, kind):
    if kind == 0:
        return str(int(value > np.median(known)))
    if kind == 1:
        return ("low", "middle", "high")[int(np.searchsorted(np.quantile(known, [1 / 3, 2 / 3]), value))]
    return f"{value:.4f}"


def described(path, *, rows=ROWS, seed=0):
    """Pieces of the descriptions of scikit-learn's data sets. Labels: whether each of 12 words is among them."""
    loaders = (datasets.load_iris, datasets.load_wine, datasets.load_breast_cancer, datasets.load_digits)
    words = re.findall(r"[a-z]+", " ".join(load().DESCR.lower() for load in loaders))
    generator = np.random.default_rng(seed)
    table = []
    for row in range(rows):
        start = int(generator.integers(len(words) - 40))
        # A word more, so that each label is there often enough.
        own = [*words[start : start + 12], *generator.choice(WORDS, 3), f"n{row}"]
        table.append({"text": " ".join(own), **{f"has_{word}": str(int(word in own)) for word in WORDS}})
    return write(path, table), [f"has_{word}" for word in WORDS]


def digit_images(folder, *, rows=ROWS, seed=0):
    """Handwritten digits of 8x8 pixels as PNG. Labels: which digit, as ten columns; whether it is even, or above 4."""
    found = datasets.load_digits()
    chosen = np.random.default_rng(seed).permutation(len(found.images))[:rows]
    (folder / "pictures").mkdir()
    table = []
    for place, number in enumerate(chosen):
        name = f"pictures/{place:03d}.png"
        Image.fromarray((found.images[number] * 15.9).astype("uint8")).save(folder / name)
        digit = int(found.target[number])
        own = {f"is_{other}": str(int(other == digit)) for other in range(10)}
        table.append({"image": name, **own, "even": "no" if digit % 2 else "yes", "large": str(int(digit > 4))})
    return write(folder / "digits.csv", table), [*(f"is_{digit}" for digit in range(10)), "even", "large"]
