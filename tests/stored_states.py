"""Small runs whose states lie in `tests/states/`, one file for each version of the format.

`python tests/stored_states.py` writes the file of the present version. A file is never written
again: it stands for the checkpoints that users have.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kfac import KFAC, LevenbergMarquardt, Preconditioner
from kfac.checkpoint import VERSION

FOLDER = Path(__file__).parent / "states"
SETTINGS: dict[str, dict[str, Any]] = {
    "momentum": {"fisher": "mc"},
    "ekfac": {"fisher": "mc", "inverse": "ekfac"},
    "inverse-free": {"fisher": "empirical", "inverse": "inverse-free"},
    "graft": {"fisher": "type-2", "graft": "adam"},
    "fallback": {"fisher": "empirical", "fallback": "adamw"},
    "automatic": {"lr": "auto", "momentum": "auto", "damping": LevenbergMarquardt(period=2)},
}
PERIODS = {"factor_update_period": 1, "inverse_update_period": 3}
BEFORE, AFTER = 3, 2  # steps before and after saving


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.PReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 3, generator=generator)
    return x, torch.randint(0, 2, (8,), generator=generator)


class Run:
    """A model with an optimizer, or with the engine alone."""

    def __init__(self, settings: dict[str, Any], *, model: nn.Module | None = None) -> None:
        torch.manual_seed(0)
        self.model = net() if model is None else model
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = KFAC(self.model, criterion=self.criterion, **PERIODS | settings)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            x, y = (t.to(next(self.model.parameters()).device) for t in batch(step))
            x = x.to(next(self.model.parameters()).dtype)

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                self.optimizer.zero_grad()
                loss: Tensor = self.criterion(self.model(x), y)
                loss.backward()
                return loss

            self.optimizer.step(closure)


def parameters(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def recorded(settings: dict[str, Any]) -> dict[str, Any]:
    """A run's state on the way, and where it goes from there."""
    run = Run(settings)
    run.train(0, BEFORE)
    model = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    # Torch's part holds the tensors that the next steps change.
    saved = torch.utils._pytree.tree_map(
        lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, run.optimizer.state_dict()
    )
    run.train(BEFORE, BEFORE + AFTER)
    return {"model": model, "optimizer": saved, "expected": parameters(run.model)}


def recorded_engine() -> dict[str, Any]:
    """The state of a :class:`kfac.Preconditioner`."""
    torch.manual_seed(0)
    model, criterion = net(), nn.CrossEntropyLoss()
    engine = Preconditioner(model, criterion=criterion)
    x, y = batch(0)
    criterion(model(x), y).backward()
    engine.step()
    return engine.state_dict()


if __name__ == "__main__":
    path = FOLDER / f"state_v{VERSION}.pt"
    if path.exists():
        raise SystemExit(f"{path} is there already.")
    FOLDER.mkdir(exist_ok=True)
    states = {name: recorded(settings) for name, settings in SETTINGS.items()}
    torch.save(states | {"engine": recorded_engine()}, path)
