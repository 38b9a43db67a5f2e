"""What every test shares: a fixed seed, and one thread, as tiny matrices want it."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
