"""What all tests of the recipes share."""

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the recipes: a second thread only waits for a busy core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
