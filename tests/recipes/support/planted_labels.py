"""Tables whose labels are noisy copies of a few, or of nothing that could be learned."""

import numpy as np

from .own_tables import write

KINDS = ("cough", "rash", "pain")
FEATURES = [f"x{place}" for place in range(8)]


def planted(path, *, rows=240, copies=3, noise=0.4, learnable=True, apart=False, seed=0):
    """Rows with labels of three kinds, each of them so many times; ``apart``: each row has a label of one copy alone.

    Returns the path, and the true groups.
    """
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(rows, len(FEATURES)))
    scores = (inputs if learnable else generator.normal(size=inputs.shape))[:, : len(KINDS)]
    table = []
    for row in range(rows):
        own = {name: f"{value:.4f}" for name, value in zip(FEATURES, inputs[row])}
        for copy in range(copies):
            for kind, score in zip(KINDS, scores[row]):
                known = not apart or row % copies == copy
                label = str(int(score + noise * generator.normal() > 0))
                own[f"{kind}_{copy}"] = label if known else ""
        table.append(own)
    return write(path, table), {tuple(f"{kind}_{copy}" for copy in range(copies)) for kind in KINDS}
