"""What all tests of the recipes share."""

import pytest
import torch

from recipes.runtime.errors import need


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the recipes: a second thread only waits for a busy core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def quiet_hub(tmp_path_factory):
    """Copies that ``datasets`` makes go into a folder of the tests, without progress bars; the folder."""
    datasets = need("datasets")
    folder = tmp_path_factory.mktemp("datasets")
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = folder
    counts, datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS, False  # by a request
    datasets.disable_progress_bars()
    yield folder
    datasets.config.HF_DATASETS_CACHE = before
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts
    datasets.enable_progress_bars()
