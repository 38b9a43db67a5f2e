"""What every test shares: a fixed seed, one thread, as tiny matrices want it, honest mutants."""

import pytest
import torch

from kfac.gradient_check import GradientCheck

torch.set_num_threads(1)


@pytest.fixture
def no_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large factors keep their diagonal only, however small the model."""
    monkeypatch.setattr("kfac.layers.base.MOST_BLOCKS", 1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _only_tests_catch_mutants(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many a planted bug would be noticed at run time; here a test has to find it."""
    if "mutant" in request.node.name:
        monkeypatch.setattr(GradientCheck, "add", lambda *_: None)
