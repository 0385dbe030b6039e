"""Tiny data of the formats that the recipes read: images that their labels can be seen in, and tables."""

import io
from pathlib import Path

import numpy as np

from recipes.data.images.celeba import ATTRIBUTES
from recipes.runtime.errors import need

pyarrow, parquet = need("pyarrow"), need("pyarrow.parquet")

#: Training and test images of each class.
CIFAR_TRAIN, CIFAR_TEST = 8, 2
#: Options of a training that takes about a second.
QUICK = (
    *("--backbone", "saliency_reg_resnet8", "--image-size", "32", "--head-width", "8", "--epochs", "2"),
    *("--batch-size", "20", "--evaluations", "2"),
)
SPLITS = {"train": 40, "valid": 20, "test": 20}


def noise(seed, height=32, width=32):
    return np.random.default_rng(seed).integers(0, 120, (height, width, 3))


def encoded(pixels, kind="PNG"):
    buffer = io.BytesIO()
    need("PIL.Image").fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def write_parquet(path, columns):
    """As others than ``datasets`` write it: without notes on the features."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)


def image_column(images):
    return pyarrow.array([{"bytes": content, "path": f"{number}.png"} for number, content in enumerate(images)])


def cifar_image(number, seed):
    """Of one class: its own stripe is bright."""
    pixels = noise(seed)
    pixels[3 * number : 3 * number + 3, :, number % 3] += 130
    return encoded(pixels)


def write_cifar(folder, train=CIFAR_TRAIN, test=CIFAR_TEST):
    """A folder like the copy of ``uoft-cs/cifar10``, with as many images of each class."""
    for split, (each, first) in {"train": (train, 0), "test": (test, 10_000)}.items():
        labels = [number % 10 for number in range(10 * each)]
        images = image_column([cifar_image(label, first + row) for row, label in enumerate(labels)])
        write_parquet(Path(folder, f"{split}.parquet"), {"img": images, "label": labels})
    return str(folder)


def write_celeba(folder, sizes=None, label=bool):
    """A folder like the copy of ``flwrlabs/celeba``. ``Bald`` is never true, and ``Male`` can be seen."""
    for number, (split, size) in enumerate((sizes or SPLITS).items()):
        truth = np.random.default_rng(number).random((size, 40)) < 0.5
        truth[:2] = np.array([[False], [True]])[:size]
        truth[:, ATTRIBUTES.index("Bald")] = False
        images = [
            encoded(noise(row, 24, 20) + 110 * truth[row, ATTRIBUTES.index("Male")], "JPEG") for row in range(size)
        ]
        columns = {"image": image_column(images), "celeb_id": list(range(size))}
        columns |= {name: list(map(label, truth[:, index].tolist())) for index, name in enumerate(ATTRIBUTES)}
        write_parquet(Path(folder, "data", f"{split}-00000-of-00001.parquet"), columns)
    return str(folder)


def write_folder(folder, count=40):
    """Images and a table with missing labels; returns the path of the table.

    ``bright`` is binary, ``stripe`` has three classes, ``level`` is a number, ``nothing`` is constant.
    """
    folder = Path(folder)
    (folder / "pictures").mkdir(parents=True)
    lines = ["image,bright,stripe,level,nothing,part"]
    for row in range(count):
        bright, stripe = row % 2, row % 3
        pixels = noise(row, 28, 36) + 80 * bright
        pixels[9 * stripe : 9 * stripe + 9] += 50
        kind = ("PNG", "JPEG")[row % 2]
        name = f"pictures/{row:03d}.{kind.lower()}"
        (folder / name).write_bytes(encoded(pixels, kind))
        labels = [str(bright), ("top", "middle", "low")[stripe], f"{20 + 3.5 * stripe + bright:.1f}"]
        shown = ["" if (row + column) % 5 == 0 else text for column, text in enumerate(labels)]
        part = ("train", "train", "val", "test")[(row // 6) % 4]
        lines.append(",".join([name, *shown, "1", part]))
    table = folder / "table.csv"
    table.write_text("\n".join(lines) + "\n")
    return str(table)


def write_tables(folder, rows=90, schools=5, each=12):
    """A folder with ``sarcos`` and ``school``, whose targets follow from the inputs; returns its path."""
    folder = Path(folder)
    for number, (split, count) in enumerate({"train": rows, "test": rows // 3}.items()):
        draw = np.random.default_rng(number)
        inputs = draw.normal(size=(count, 21))
        slopes = np.random.default_rng(9).normal(size=(21, 7))
        names = [f"{kind}_{joint}" for kind in ("position", "velocity", "acceleration") for joint in range(1, 8)]
        columns = dict(zip(names, inputs.T)) | {
            f"torque_{joint + 1}": (inputs @ slopes)[:, joint] for joint in range(7)
        }
        write_parquet(folder / "sarcos" / f"{split}.parquet", columns)
        pupils = draw.integers(0, 2, (schools * each, 28))
        columns = {f"x{column:02d}": pupils[:, column] for column in range(28)}
        columns["score"] = pupils[:, :3].sum(1) * 5.0 + draw.normal(size=len(pupils))
        columns["school"] = np.arange(len(pupils)) % schools + 1
        write_parquet(folder / "school" / f"{split}.parquet", columns)
    return str(folder)
