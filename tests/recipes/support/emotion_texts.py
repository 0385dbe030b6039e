"""Small tables of the schema of GoEmotions."""

from __future__ import annotations

import pandas as pd
import torch

WORDS = ("great", "sad", "why", "thanks", "awful", "love", "really", "dog", "house", "today", "never", "blue")


def rows(number: int, seed: int, prefix: str = "") -> pd.DataFrame:
    generator = torch.Generator().manual_seed(seed)
    texts, labels = [], []
    for _ in range(number):
        words = torch.randint(len(WORDS), (int(torch.randint(2, 9, (), generator=generator)),), generator=generator)
        texts.append(prefix + " ".join(WORDS[word] for word in words))
        # The first word says one emotion, and the last one another.
        labels.append(sorted({int(words[0]) % 28, 12 + int(words[-1])}))
    return pd.DataFrame({"text": texts, "labels": labels, "id": [f"id{seed}_{row}" for row in range(number)]})
