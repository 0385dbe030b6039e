"""A small table of molecules: chains with five kinds of ends, one of them a second time, and one that cannot be read."""

import csv

ENDS = {"alcohol": "O", "amine": "N", "chloride": "Cl", "acid": "C(=O)O", "benzene": "c1ccccc1"}
ASPIRIN = "CC(=O)Oc1ccccc1C(=O)O"
UNREADABLE = "C1CC("
TASKS = ("acid", "aromatic", "long", "polar")


def rows_of_table():
    """Dictionaries: an unreadable row second, aspirin third, then chains; ethanol comes twice, written in two ways."""
    found = [
        {"name": "ethanol again", "structure": "OCC", "acid": 0, "aromatic": 0, "long": 0, "polar": 1},
        {"name": "broken", "structure": UNREADABLE, "acid": 1, "aromatic": 1, "long": 1, "polar": 1},
        {"name": "aspirin", "structure": ASPIRIN, "acid": 1, "aromatic": 1, "long": 0, "polar": 1},
    ]
    for length in range(1, 13):
        for kind, end in ENDS.items():
            own = {"acid": kind == "acid", "aromatic": kind == "benzene", "long": length > 6}
            labels = {task: int(value) for task, value in own.items()} | {"polar": int(kind in ("alcohol", "acid"))}
            if length % 4 == 0:
                labels["long"] = ""
            found.append({"name": f"{kind} {length}", "structure": "C" * length + end, **labels})
    return [{**row, "mass": 10.5 * number, "empty": ""} for number, row in enumerate(found)]


def write_molecules(path, rows=None):
    """Write them as CSV; returns the path as text."""
    rows = rows or rows_of_table()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)
